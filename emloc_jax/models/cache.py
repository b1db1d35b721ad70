"""The key/value cache of generation: an explicit pytree that the caller holds."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from emloc_jax.models.config import DecoderConfig

__all__ = ["grow_cache", "init_cache"]


def init_cache(
    config: DecoderConfig, batch: int, slots: int, dtype: Any = jnp.float32
) -> dict[str, Array]:
    """An empty cache.

    Args:
        config: the decoder's shape.
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
