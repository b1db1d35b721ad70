"""One name per layer for every parameter, whether the tree is unrolled or scanned."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from emloc_jax.kernels import flatten_leaves, materialize

__all__ = [
    "LayerLeaf",
    "LazyLeaf",
    "depth_at",
    "is_scanned",
    "layer_leaves",
    "scanned_path",
    "unrolled_paths",
]

# A model may have several kinds of layers: `double_layers` and `single_layers`, or `layers` and
# `vision/layers` say.
_LAYER = re.compile(r"((?:vision/)?(?:\w+_)?layers)/(.+)")
_UNROLLED = re.compile(r"((?:vision/)?(?:\w+_)?layers)/(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class LayerLeaf:
    """One layer's share of a leaf: the leaf itself, or slice `layer` of a stacked one."""

    leaf: Any
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this layer's share stands for; nothing is computed."""
        shape = jax.eval_shape(materialize, self.leaf).shape
        return shape if self.layer is None else shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of that array."""
        return np.dtype(jax.eval_shape(materialize, self.leaf).dtype)

    def array(self) -> np.ndarray:
        """The parameter as a numpy array; a box is turned into its array, for this layer only."""
        leaf = self.leaf
        if self.layer is not None:
            leaf = jax.tree.map(lambda x: x[self.layer], leaf)
        return np.asarray(materialize(leaf))


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """A parameter that is read when it is asked for.

    Attributes:
      shape: of the array.
      dtype: of the array.
      read: gives it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def array(self) -> np.ndarray:
        """The parameter."""
        return self.read()


def is_scanned(paths: Any) -> bool:
    """Whether paths below `layers/` carry no layer number, so that their leaves are stacked.

    >>> is_scanned(["layers/mlp/up_proj/kernel"]), is_scanned(["layers/3/mlp/up_proj/kernel"])
    (True, False)
    """
    return any(_LAYER.fullmatch(path) and not _UNROLLED.fullmatch(path) for path in paths)


def scanned_path(path: str) -> tuple[str, int | None]:
    """Path and layer in the scanned tree of an unrolled path.

    >>> scanned_path("layers/3/mlp/up_proj/kernel"), scanned_path("norm/scale")
    (('layers/mlp/up_proj/kernel', 3), ('norm/scale', None))
    """
    match = _UNROLLED.fullmatch(path)
    return (f"{match[1]}/{match[3]}", int(match[2])) if match else (path, None)


def depth_at(path: str, depths: Mapping[str, int]) -> int:
    """How many layers there are of the kind that a path in the scanned tree lies in.

    >>> depth_at("vision/layers/mlp/output/kernel", {"vision/layers": 3, "layers": 5})
    3
    """
    return next(depth for kind, depth in depths.items() if path.startswith(f"{kind}/"))


def unrolled_paths(path: str, depth: int) -> list[tuple[str, int]]:
    """Unrolled paths and layers of a path in the scanned tree; none outside the layers.

    >>> unrolled_paths("layers/norm/scale", 2), unrolled_paths("norm/scale", 2)
    ([('layers/0/norm/scale', 0), ('layers/1/norm/scale', 1)], [])
    """
    match = _LAYER.fullmatch(path)
    return [(f"{match[1]}/{i}/{match[2]}", i) for i in range(depth)] if match else []


def layer_leaves(params: Mapping[str, Any]) -> dict[str, LayerLeaf]:
    """Every parameter of the tree under its unrolled path; nothing is sliced or copied yet.

    >>> import numpy as np
    >>> sorted(layer_leaves({"layers": {"norm": {"scale": np.ones((2, 4))}}}))
    ['layers/0/norm/scale', 'layers/1/norm/scale']
    """
    leaves = flatten_leaves(params)
    if not is_scanned(leaves):
        return {path: LayerLeaf(leaf, None) for path, leaf in leaves.items()}
    split = {}
    for path, leaf in leaves.items():
        depth = jax.tree.leaves(leaf)[0].shape[0] if _LAYER.fullmatch(path) else None
        if depth is None:
            split[path] = LayerLeaf(leaf, None)
            continue
        for unrolled, i in unrolled_paths(path, depth):
            split[unrolled] = LayerLeaf(leaf, i)
    return split
