"""Where the parameters of a block stack come from, one block at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from emloc_jax.models.block_stack import BlockStack

__all__ = ["BlockSource", "MemoryBlocks"]


class BlockSource(Protocol):
    """Parameters that are fetched a block at a time, from a disk or from the host's memory.

    Every call may read anew and nothing is kept, so whoever calls decides what lives how long.
    Calls may come from another thread than the one that made the source.
    """

    @property
    def num_blocks(self) -> int:
        """L."""
        ...

    def outer(self) -> Any:
        """The parameters outside the blocks, as ``BlockStack.outer`` gives them."""
        ...

    def block(self, index: int) -> Any:
        """The parameters of one block, as ``BlockStack.block_params`` gives them."""
        ...


@dataclasses.dataclass(frozen=True)
class MemoryBlocks:
    """Parameters that lie in memory, on the host or on a device, in either layout of the layers.

    Attributes:
        stack: of the model.
        params: all its parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import Decoder, DecoderConfig, MemoryBlocks, block_stack
        >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> model, tokens = Decoder(config, scan_layers=True), jnp.zeros((1, 5), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> blocks = MemoryBlocks(block_stack(model), params)
        >>> blocks.num_blocks, blocks.block(1)["mlp"]["up_proj"]["kernel"].shape
        (2, (16, 24))
    """

    stack: BlockStack
    params: Any

    @property
    def num_blocks(self) -> int:
        """L."""
        return self.stack.num_blocks

    def outer(self) -> Any:
        """The parameters outside the blocks."""
        return self.stack.outer(self.params)

    def block(self, index: int) -> Any:
        """The parameters of one block; slices of scanned ones are copies."""
        return self.stack.block_params(self.params, index)
