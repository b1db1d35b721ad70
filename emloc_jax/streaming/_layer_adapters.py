"""Adapters of one block, taken out of those of the model and put back together."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.adapters import Adapter, Trainable, attach, lora_alone
from emloc_jax.models import BlockSource

__all__ = ["AdaptedBlocks", "block_adapters", "join_adapter", "split_adapter"]


def split_adapter(path: str, adapter: Adapter) -> list[tuple[str, Adapter]]:
    """The adapter of every layer by its unrolled path; one that is not stacked as it is."""
    if not adapter.stack_shape:
        return [(path, adapter)]
    inner = path.removeprefix("layers/")
    return [
        (f"layers/{i}/{inner}", jax.tree.map(lambda x, i=i: x[i], adapter))
        for i in range(adapter.stack_shape[0])
    ]


def join_adapter(adapter: Adapter, parts: Sequence[Adapter]) -> Adapter:
    """The inverse of `split_adapter`, stacked if `adapter` is."""
    if not adapter.stack_shape:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def block_adapters(adapters: Mapping[str, Adapter], index: int) -> dict[str, Adapter]:
    """The adapters of one block by path inside it."""
    found = {}
    for path, adapter in adapters.items():
        if not path.startswith("layers/"):
            continue
        if adapter.stack_shape:
            inner = path.removeprefix("layers/")
            found[inner] = jax.tree.map(lambda x: x[index], adapter)
        elif path.startswith(f"layers/{index}/"):
            found[path.removeprefix(f"layers/{index}/")] = adapter
    return found


class AdaptedBlocks:
    """A `BlockSource` with adapters attached.

    Args:
      source: of the parameters.
      adapters: of the whole model, stacked or not.

    Raises:
      AdapterMismatchError: a parameter was trained whole.

    Attributes:
      num_blocks: L.
    """

    def __init__(self, source: BlockSource, adapters: Mapping[str, Trainable]):
        self._source = source
        self._adapters = lora_alone(adapters, "A model that is read a block at a time")
        self.num_blocks = source.num_blocks

    def outer(self) -> Any:
        """The parameters outside the blocks, with their adapters."""
        own = {p: a for p, a in self._adapters.items() if not p.startswith("layers/")}
        return attach(self._source.outer(), own)

    def block(self, index: int) -> Any:
        """The parameters of one block, with its adapters."""
        return attach(self._source.block(index), block_adapters(self._adapters, index))
