"""The key/value cache of generation: an explicit pytree that the caller holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["KeysValues", "grow_cache", "init_cache", "write_cache"]

KeysValues = tuple[Array, Array]


def init_cache(config: Any, batch: int, slots: int, dtype: Any = jnp.float32) -> dict[str, Array]:
    """An empty cache.

    Args:
        config: of a causal model: ``num_layers``, ``num_kv_heads`` and ``head_dim`` are read.
        batch: B.
        slots: S, the number of tokens a row can hold, padding included. Writing more than S
            tokens cannot be noticed under jit; the caller counts.
        dtype: of keys and values; the model's compute dtype.

    Returns:
        ``'k'`` and ``'v'`` (L, B, S, num_kv_heads, head_dim), ``'positions'`` (B, S) int32 with -1
        where a slot is empty or padding, ``'length'`` () int32, the next free slot of all rows.

    Example:
        >>> from emloc_jax.models import DecoderConfig, init_cache
        >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> init_cache(config, batch=1, slots=8)["k"].shape
        (3, 1, 8, 2, 4)
    """
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "positions": jnp.full((batch, slots), -1, jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }


def grow_cache(cache: dict[str, Array], slots: int) -> dict[str, Array]:
    """The same cache with room for more tokens.

    A prompt is read through a cache of its own size, so that its attention is not spent on empty
    slots, and the cache is grown once for what follows.

    Args:
        cache: from ``init_cache`` or a ``decode``.
        slots: the new S, at least the old one.

    Returns:
        A cache with S = ``slots``.
    """
    extra = slots - cache["positions"].shape[1]
    heads = ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))
    return {
        "k": jnp.pad(cache["k"], heads),
        "v": jnp.pad(cache["v"], heads),
        "positions": jnp.pad(cache["positions"], ((0, 0), (0, extra)), constant_values=-1),
        "length": cache["length"],
    }


def write_cache(
    cache: KeysValues, new: Sequence[Array], layer: int | Array, slot: Array
) -> tuple[KeysValues, Array, Array]:
    """Writes one layer's new keys and values, in place inside a compiled loop.

    Args:
        cache: keys and values of all layers, (L, B, S, KV, head_dim) each.
        new: keys and values of the new tokens, (B, T, KV, head_dim) each.
        layer: index of the layer.
        slot: () int32, where in S the new tokens go.

    Returns:
        (the cache, this layer's keys (B, S, KV, head_dim), its values).
    """
    start = (layer, 0, slot, 0, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, fresh[None].astype(old.dtype), start)
        for old, fresh in zip(cache, new, strict=True)
    )
    own_keys = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
    own_values = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
    return (keys, values), own_keys, own_values
