"""Whether adapters fit a parameter tree, before anything is computed."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from emloc_jax.adapters._adapter import Adapter
from emloc_jax.adapters._whole import Trainable, Whole
from emloc_jax.errors import AdapterMismatchError
from emloc_jax.kernels import LoraKernel, flatten_leaves, peel

__all__ = ["fitting_leaves"]

SHOWN = 3  # differing paths named per side


def fitting_leaves(
    params: Mapping[str, Any], adapters: Mapping[str, Trainable], *, name: str = "the parameters"
) -> dict[str, Any]:
    """Picks the leaf of every adapter, after comparing paths and shapes.

    Args:
      params: nested tree whose kernels may be boxed.
      adapters: {path: Adapter or Whole}.
      name: what to call `params` in the message.

    Returns:
      {path: leaf} for the paths of `adapters`, boxes and sharding metadata still on.

    Raises:
      AdapterMismatchError: a path is missing or a shape differs; names the first of each.
    """
    leaves = flatten_leaves(params)
    missing = [path for path in adapters if path not in leaves]
    if missing:
        found = _nearest(missing[0], leaves)
        raise AdapterMismatchError(
            f"{len(missing)} of {len(adapters)} adapters have no kernel in {name}: "
            f"{_listed(missing)}. Nearest paths there: {_listed(found)}. The adapters were made "
            "for another model, for another layout of the layers (scanned or unrolled), or the "
            "tree given is not the bare `params` collection."
        )
    wrong = []
    for path, adapter in adapters.items():
        shape = _shape(leaves[path])
        if isinstance(adapter, Whole):
            if shape != tuple(adapter.value.shape):
                wrong.append(f"'{path}': {shape}, trained whole as {tuple(adapter.value.shape)}")
        elif shape != adapter.kernel_shape or not _consistent(adapter):
            wrong.append(
                f"'{path}': kernel {shape}, adapter for {adapter.kernel_shape} "
                f"(lora_a {tuple(adapter.lora_a.shape)}, lora_b {tuple(adapter.lora_b.shape)})"
            )
    if wrong:
        raise AdapterMismatchError(
            f"{len(wrong)} of {len(adapters)} adapters differ in shape from their kernel in "
            f"{name}: {'; '.join(wrong[:SHOWN])}. The adapters were made for another model."
        )
    return {path: leaves[path] for path in adapters}


def _shape(leaf: Any) -> tuple[int, ...]:
    """Shape of the array that a leaf stands for, without forming it."""
    if not isinstance(leaf, meta.AxisMetadata):
        return tuple(leaf.shape)
    return tuple(jax.eval_shape(_array, leaf).shape)


def _array(leaf: Any) -> jax.Array:
    leaf = peel(leaf)
    while isinstance(leaf, LoraKernel):  # the kernel under an adapter; dropout refuses `unbox`
        leaf = peel(leaf.base)
    return meta.unbox(leaf)


def _consistent(adapter: Adapter) -> bool:
    axes = len(adapter.stack_shape)
    return adapter.lora_b.shape[: axes + 1] == (*adapter.stack_shape, adapter.rank) and (
        len(adapter.out_shape) == adapter.layout.num_out
    )


def _nearest(path: str, leaves: Mapping[str, Any]) -> list[str]:
    return difflib.get_close_matches(path, leaves, n=SHOWN, cutoff=0.0)


def _listed(paths: list[str]) -> str:
    shown = ", ".join(f"'{path}'" for path in paths[:SHOWN])
    return shown + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
