"""The shapes of what a streamed model works on, without a weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from emloc_jax._program import tree_bytes
from emloc_jax.streaming._model import StreamedModel

__all__ = ["BlockShapes", "block_shapes"]


@dataclasses.dataclass(frozen=True)
class BlockShapes:
    """Trees of `jax.ShapeDtypeStruct`.

    Attributes:
      outer: the parameters outside the blocks.
      block: those of one block; all blocks are alike.
      x: what goes into a block, and what comes out of it.
      context: what every block reads besides.
      batch: of tokens.
      count: number of blocks.
    """

    outer: Any
    block: Any
    x: Any
    context: Any
    batch: Any
    count: int

    @property
    def next_block(self) -> int:
        """Bytes of the block that `walk` sends ahead while one is at work."""
        return tree_bytes(self.block) if self.count > 1 else 0

    @property
    def read(self) -> int:
        """Bytes on the host while a block is read: it, and one tensor of it as it is stored."""
        return tree_bytes(self.block) + max(
            tree_bytes(leaf) for leaf in jax.tree.leaves(self.block)
        )


def block_shapes(model: StreamedModel, params: Any, batch: Mapping[str, Any]) -> BlockShapes:
    """The shapes of a model whose blocks are alike.

    Args:
      model: its parts.
      params: all its parameters, or their shapes.
      batch: a batch, or its shapes.
    """
    stack = model.stack
    outer = jax.eval_shape(stack.outer, params)
    batch = dict(batch)
    return BlockShapes(
        outer=outer,
        block=jax.eval_shape(lambda tree: stack.block_params(tree, 0), params),
        x=jax.eval_shape(model.embed, outer, batch),
        context=jax.eval_shape(model.context, batch),
        batch=jax.eval_shape(lambda tree: tree, batch),
        count=stack.num_blocks,
    )
