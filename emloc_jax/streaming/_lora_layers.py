"""The adapters of one block out of all of them, and its gradients back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.adapters import Adapter
from emloc_jax.errors import AdapterMismatchError, ConfigError

__all__ = ["AdapterLayers"]


class AdapterLayers:
    """Which adapters belong to which block, in either layout of the layers.

    Args:
      adapters: {path: Adapter}, arrays or shapes; scanned ones have a leading axis L.
      name: what the blocks are called in paths.
      num_blocks: L.

    Raises:
      ConfigError: an adapter outside the blocks.
      AdapterMismatchError: an adapter of a block that is not there, or of another number of blocks.

    Example:
      >>> adapters = {"layers/up/kernel": Adapter(jnp.ones((3, 8, 2)), jnp.ones((3, 2, 6)), 4.0)}
      >>> layers = AdapterLayers(adapters, "layers", 3)
      >>> layers.take(adapters, 1)["up/kernel"].lora_a.shape
      (8, 2)
    """

    def __init__(self, adapters: Mapping[str, Adapter], name: str, num_blocks: int):
        self._scanned: dict[str, str] = {}  # from the path in a block to the path in the model
        self._own: list[dict[str, str]] = [{} for _ in range(num_blocks)]
        for path, adapter in adapters.items():
            first, _, rest = path.partition("/")
            if first != name or not rest:
                raise ConfigError(
                    f"The adapter on '{path}' lies outside the blocks, and streamed LoRA trains "
                    f"those on '{name}/...' only. Leave it out of `where`, or train in memory."
                )
            index, _, local = rest.partition("/")
            if not index.isdigit():
                if adapter.stack_shape[:1] != (num_blocks,):
                    raise AdapterMismatchError(
                        f"The adapter on '{path}' has the leading axes {adapter.stack_shape}, but "
                        f"the model has {num_blocks} blocks. Use adapters of this model."
                    )
                self._scanned[rest] = path
            elif int(index) < num_blocks:
                self._own[int(index)][local] = path
            else:
                raise AdapterMismatchError(
                    f"There is an adapter on '{path}', but the model has {num_blocks} blocks. "
                    "Use adapters of this model."
                )
        self._slice = jax.jit(_slice)
        self._write = jax.jit(_write, donate_argnums=0, static_argnames="add")
        self._replace = jax.jit(_replace, donate_argnums=0, static_argnames="add")

    def take(self, tree: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The part of `tree` (a value per adapter, stacked as the adapters are) of one block."""
        part = {local: tree[path] for local, path in self._own[index].items()}
        if self._scanned:
            stacked = {local: tree[path] for local, path in self._scanned.items()}
            part |= self._slice(stacked, index)
        return part

    def shapes(self, tree: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The same of shapes."""
        return jax.eval_shape(lambda tree: self.take(tree, index), tree)

    def put(self, sums: dict[str, Any], index: int, gradients: Any, *, add: bool) -> None:
        """Writes the gradients of one block into `sums`, in fp32, or adds them there.

        A program of its own: the sums then get the rounded gradients, as in a scanned step.
        """
        for local, path in self._own[index].items():
            sums[path] = self._replace(sums[path], gradients[local], add=add)
        if self._scanned:
            old = {local: sums[path] for local, path in self._scanned.items()}
            own = {local: gradients[local] for local in self._scanned}
            new = self._write(old, own, index, add=add)
            sums.update((self._scanned[local], value) for local, value in new.items())


def _slice(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree
    )


def _write(sums: Any, parts: Any, index: jax.Array, add: bool) -> Any:
    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        part = part.astype(jnp.float32)
        if add:
            part = jax.lax.dynamic_index_in_dim(whole, index, keepdims=False) + part
        return jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)

    return jax.tree.map(write, sums, parts)


def _replace(sums: Any, parts: Any, add: bool) -> Any:
    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        part = part.astype(jnp.float32)
        return whole + part if add else part

    return jax.tree.map(write, sums, parts)
