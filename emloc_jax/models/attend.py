"""The attention product that all models share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["attend"]

# Scores are (B, N, T, S) in fp32, several times over in a backward pass. For rows longer than this
# they are made for so many queries at a time, and made again for the backward pass.
_LONG = 512
_QUERIES = 256


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array | None,
    *,
    causal: bool,
    window: int | None = None,
    implementation: Any = None,
) -> Array:
    """``softmax(q kᵀ / √head_dim) v`` of every head, heads side by side.

    The softmax is fp32 whatever the inputs are. N may be a multiple of the number of key heads.
    Without a fused implementation, rows of more than 512 tokens take their queries 256 at a time,
    so that memory grows with T and not with its square.

    Args:
        queries: (B, T, N, head_dim).
        keys: (B, S, KV, head_dim).
        values: the same.
        mask: (B, 1, T, S) bool, True where a query may look; None: the rows are whole sequences.
        causal: without a mask, tokens see earlier ones only. That is said in words, not in a
            (T, T) array, so that a fused implementation can skip what is not seen.
        window: without a mask, causal tokens see this many, themselves included.
        implementation: of ``jax.nn.dot_product_attention``.

    Returns:
        (B, T, N · head_dim) in the type of the queries.

    Example:
        >>> import jax.numpy as jnp
        >>> from emloc_jax.models.attend import attend
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> attend(x, x, x, None, causal=True).shape
        (1, 3, 8)
    """
    batch, length, heads, width = queries.shape
    keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
    causal = causal and mask is None
    narrow = causal and window is not None and window < length
    if implementation in (None, "xla") and length > _LONG:
        seen = window if narrow else None
        mixed = _by_queries(queries, keys, values, mask, causal=causal, window=seen)
    else:
        mixed = jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            mask=mask,
            is_causal=causal,
            local_window_size=(window - 1, 0) if narrow and window is not None else None,
            implementation=implementation,
        )
    return mixed.reshape(batch, length, heads * width)


def _by_queries(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array | None,
    *,
    causal: bool,
    window: int | None,
) -> Array:
    """The same for some queries at a time; every query sees all its keys at once."""
    batch, length, heads, width = queries.shape
    count = -(-length // _QUERIES)
    short = count * _QUERIES - length
    queries = jnp.pad(queries, ((0, 0), (0, short), (0, 0), (0, 0)))
    if (
        mask is not None
    ):  # what the queries that fill up see does not matter, but they see something
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys.shape[1]))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, short), (0, 0)), constant_values=True)
    places = jnp.arange(keys.shape[1])

    @jax.checkpoint
    def part(start: Array) -> Array:
        own = None
        if mask is not None:
            own = jax.lax.dynamic_slice_in_dim(mask, start, _QUERIES, axis=2)
        elif causal:
            behind = (start + jnp.arange(_QUERIES))[:, None] - places[None, :]
            own = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            own = own[None, None]
        some = jax.lax.dynamic_slice_in_dim(queries, start, _QUERIES, axis=1)
        return jax.nn.dot_product_attention(some, keys, values, mask=own, implementation="xla")

    parts = jax.lax.map(part, _QUERIES * jnp.arange(count))
    return jnp.moveaxis(parts, 0, 1).reshape(batch, -1, heads, width)[:, :length]
