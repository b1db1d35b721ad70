"""What the file of an emulator holds, said before anything of it is there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from emloc_jax.checkpoints._dtypes import WORDS
from emloc_jax.checkpoints._safetensors_write import TensorPlan
from emloc_jax.errors import CheckpointError
from emloc_jax.kernels import Layout, LowRankKernel, flatten_leaves, is_box, peel

__all__ = ["EmulatorPlan", "plan_emulator"]


@dataclasses.dataclass(frozen=True)
class EmulatorPlan:
    """What an emulator's file will hold.

    Attributes:
      arrays: by name in the file, or their shapes and dtypes.
      ranks: of the compressed kernels, by path.
      layouts: of the compressed kernels, by path.
    """

    arrays: dict[str, Any]
    ranks: dict[str, int]
    layouts: dict[str, Layout]

    @property
    def tensors(self) -> list[TensorPlan]:
        """The tensors to write, in order."""
        return [
            TensorPlan(path, WORDS[np.dtype(a.dtype)], tuple(a.shape))
            for path, a in self.arrays.items()
        ]


def plan_emulator(emulator: Mapping[str, Any]) -> EmulatorPlan:
    """What the file of an emulator holds.

    Args:
      emulator: its tree; the arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
      CheckpointError: see `save_emulator`.
    """
    arrays: dict[str, Any] = {}
    ranks, layouts = {}, {}
    for path, leaf in flatten_leaves(emulator).items():
        leaf = peel(leaf)
        if isinstance(leaf, LowRankKernel):
            arrays[f"{path}/left"], arrays[f"{path}/right"] = peel(leaf.left), peel(leaf.right)
            ranks[path], layouts[path] = leaf.rank, leaf.layout
        elif is_box(leaf):
            raise CheckpointError(
                f"The leaf '{path}' is a {type(leaf).__name__}; an emulator holds arrays and "
                "LowRankKernel boxes. Save the tree that compress returned."
            )
        else:
            arrays[path] = leaf
    odd = [path for path, array in arrays.items() if np.dtype(array.dtype) not in WORDS]
    if odd:
        raise CheckpointError(f"These leaves are not fp32, fp16 or bf16: {', '.join(odd[:8])}.")
    return EmulatorPlan(arrays, ranks, layouts)
