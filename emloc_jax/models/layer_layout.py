"""Between the unrolled and the scanned tree of a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.errors import ConfigError
from emloc_jax.kernels import get_leaf, set_leaves

__all__ = ["layer_depths", "stack_layers", "unstack_layers"]


def layer_depths(config: Any) -> dict[str, int]:
    """How many layers of each kind a model has, by their place in its parameter tree.

    Args:
        config: of any model here.

    Returns:
        ``{'layers': L}``, or what a model with several kinds of layers says.

    Example:
        >>> from emloc_jax.models import FluxConfig, layer_depths
        >>> layer_depths(FluxConfig())
        {'double_layers': 19, 'single_layers': 38}
    """
    return dict(getattr(config, "layer_depths", None) or {"layers": config.num_layers})


def stack_layers(params: Mapping[str, Any], num_layers: int | Mapping[str, int]) -> dict[str, Any]:
    """The scanned tree of an unrolled one: ``layers/0/…, layers/1/…`` become ``layers/…``.

    Args:
        params: unrolled parameters; leaves may be boxes, whose arrays are stacked.
        num_layers: L, or the ``layer_depths`` of a model with several kinds of layers.

    Returns:
        A new dict in which every leaf under ``layers`` has a leading axis L. NumPy leaves stay on
        the host.

    Raises:
        ConfigError: the layers are not 0 to L-1, or differ in structure or shape (boxes of
            different rank, say), so that no single block can be scanned over them.

    Example:
        >>> import numpy as np
        >>> from emloc_jax.models import stack_layers
        >>> params = {"layers": {"0": {"scale": np.ones(4)}, "1": {"scale": np.ones(4)}}}
        >>> stack_layers(params, 2)["layers"]["scale"].shape
        (2, 4)
    """
    depths = _depths(num_layers)
    return set_leaves(
        params,
        {kind: _stacked(get_leaf(params, kind), kind, depth) for kind, depth in depths.items()},
    )


def _depths(num_layers: int | Mapping[str, int]) -> Mapping[str, int]:
    return num_layers if isinstance(num_layers, Mapping) else {"layers": num_layers}


def _stacked(unrolled: Mapping[str, Any], kind: str, depth: int) -> Any:
    names = [str(index) for index in range(depth)]
    if set(unrolled) != set(names):
        raise ConfigError(
            f"Unrolled {kind} 0 to {depth - 1} were asked to be stacked, but the parameters "
            f"hold layers {sorted(unrolled)}. Pass the num_layers of their config."
        )
    layers = [unrolled[name] for name in names]
    for name, layer in zip(names, layers, strict=True):
        _require_same(layers[0], layer, name)
    return jax.tree.map(_stack, *layers)


def unstack_layers(
    params: Mapping[str, Any], num_layers: int | Mapping[str, int]
) -> dict[str, Any]:
    """The unrolled tree of a scanned one; the inverse of ``stack_layers``.

    Args:
        params: scanned parameters; leaves may be boxes.
        num_layers: L, or the ``layer_depths`` of a model with several kinds of layers.

    Returns:
        A new dict with ``layers/0/…`` to ``layers/{L-1}/…``.

    Raises:
        ConfigError: a leaf under ``layers`` has no leading axis of length L.

    Example:
        >>> import numpy as np
        >>> from emloc_jax.models import unstack_layers
        >>> unstack_layers({"layers": {"scale": np.ones((2, 4))}}, 2)["layers"]["1"]["scale"].shape
        (4,)
    """
    depths = _depths(num_layers)
    return set_leaves(
        params,
        {kind: _unstacked(get_leaf(params, kind), kind, depth) for kind, depth in depths.items()},
    )


def _unstacked(scanned: Any, kind: str, depth: int) -> dict[str, Any]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(scanned):
        if leaf.shape[:1] != (depth,):
            raise ConfigError(
                f"{depth} scanned layers were asked to be unrolled, but "
                f"{kind}{jax.tree_util.keystr(path)} has shape {leaf.shape}. Pass scanned "
                "parameters and the num_layers of their config."
            )
    return {
        str(index): jax.tree.map(lambda leaf, index=index: leaf[index], scanned)
        for index in range(depth)
    }


def _stack(*leaves: Any) -> Any:
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)


def _require_same(first: Any, other: Any, name: str) -> None:
    structures = jax.tree.structure(first), jax.tree.structure(other)
    if structures[0] == structures[1]:
        pairs = zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(other), strict=True)
        different = [
            f"{jax.tree_util.keystr(path)} is {a.shape} and {b.shape}"
            for (path, a), b in pairs
            if a.shape != b.shape
        ]
    else:
        different = ["their trees have different keys or boxes"]
    if different:
        raise ConfigError(
            f"Layers 0 and {name} were asked to be stacked, but {different[0]}. Layers that "
            "differ cannot be scanned over; use the unrolled model."
        )
