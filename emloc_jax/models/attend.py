"""The attention product that all models share."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

__all__ = ["attend"]


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
    causal = causal and mask is None
    narrow = causal and window is not None and window < length
    mixed = jax.nn.dot_product_attention(
        queries,
        keys.astype(queries.dtype),
        values.astype(queries.dtype),
        mask=mask,
        is_causal=causal,
        local_window_size=(window - 1, 0) if narrow and window is not None else None,
        implementation=implementation,
    )
    return mixed.reshape(batch, length, heads * width)
