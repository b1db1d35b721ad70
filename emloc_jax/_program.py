"""A program of a stage, with what lies on the device while it runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from emloc_jax._program_memory import ProgramMemory

__all__ = ["Program", "tree_bytes"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage.

    Attributes:
      lowered: the real program on shapes, or its figures.
      arguments: bytes of its arguments by what they are; those that are not named here count as
        `other arguments`.
      shared: bytes of its arguments that `beside` or the stage's `resident` count already; None:
        all of them.
      beside: bytes on the device while it runs, by what they are, that are not among its arguments
        (but for what `shared` says).
      host: bytes of host memory while it runs, by what they are.
    """

    lowered: jax.stages.Lowered | ProgramMemory
    arguments: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shared: int | None = 0
    beside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    host: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def own(self, memory: ProgramMemory) -> int:
        """Bytes of its arguments, by its figures, that nothing else counts."""
        return 0 if self.shared is None else memory.arguments - self.shared


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> tree_bytes({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
      36
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
