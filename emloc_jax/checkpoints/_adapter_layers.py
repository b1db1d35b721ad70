"""Adapters split into one per layer, and joined again along the scan axis."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from emloc_jax.adapters import Adapter
from emloc_jax.checkpoints._layers import depth_at, scanned_path, unrolled_paths
from emloc_jax.errors import AdapterMismatchError

__all__ = ["join_layers", "split_layers"]


def split_layers(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Adapters under unrolled paths: a stacked one becomes one adapter per layer.

    Raises:
      AdapterMismatchError: an adapter is stacked along more than the layers.
    """
    split = {}
    for path, adapter in adapters.items():
        stack = adapter.stack_shape
        if not stack:
            split[path] = adapter
        elif len(stack) == 1 and (unrolled := unrolled_paths(path, stack[0])):
            for own, i in unrolled:
                split[own] = jax.tree.map(lambda x, i=i: x[i], adapter)
        else:
            raise AdapterMismatchError(
                f"The adapter on '{path}' is stacked along {stack}; only one stacked axis, the "
                "layers, can be saved as a PEFT adapter."
            )
    return split


def join_layers(adapters: Mapping[str, Adapter], depths: Mapping[str, int]) -> dict[str, Adapter]:
    """Adapters under scanned paths: those of all layers stacked into one.

    Args:
      adapters: under unrolled paths.
      depths: `layer_depths` of the model.

    Raises:
      AdapterMismatchError: a kernel has an adapter in some layers only, or of different rank or
        scale in different layers.
    """
    groups: dict[str, dict[int | None, Adapter]] = {}
    for path, adapter in adapters.items():
        where, layer = scanned_path(path)
        groups.setdefault(where, {})[layer] = adapter
    joined = {}
    for where, layers in groups.items():
        if None in layers:
            joined[where] = layers[None]
            continue
        every = range(depth_at(where, depths))
        if set(layers) != set(every):
            lacking = sorted(set(every) - {i for i in layers if i is not None})
            raise AdapterMismatchError(
                f"The kernel '{where}' has no adapter in layer(s) {lacking}, so the adapters "
                "cannot be stacked for scanned layers. Load the model with scan_layers=False."
            )
        parts = [layers[i] for i in every]
        if len({(p.rank, p.alpha, p.rslora) for p in parts}) > 1:
            raise AdapterMismatchError(
                f"The adapters on '{where}' differ in rank or alpha between layers, so they cannot "
                "be stacked for scanned layers. Load the model with scan_layers=False."
            )
        joined[where] = jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
    return joined
