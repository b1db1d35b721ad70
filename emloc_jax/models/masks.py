"""Which token may look at which, as boolean masks."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

__all__ = ["cache_mask", "causal_mask", "segment_mask"]


def segment_mask(segments: Array) -> Array:
    """Tokens of equal segments see one another, in both directions.

    Padding sees padding: no row of the mask is empty, and no real token sees a padded one.

    Args:
        segments: (B, T) int32, 0 for padding.

    Returns:
        (B, 1, T, T) bool, True where a query (third axis) may see a key (fourth).

    Example:
        >>> import jax.numpy as jnp
        >>> from emloc_jax.models.masks import segment_mask
        >>> segment_mask(jnp.array([[1, 1, 0]]))[0, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def causal_mask(segments: Array, window: int | None = None) -> Array:
    """Tokens see earlier tokens of their own segment, and themselves.

    Args:
        segments: (B, T) int32, 0 for padding.
        window: see themselves and the ``window - 1`` tokens before them; None: all before them.

    Returns:
        (B, 1, T, T) bool.
    """
    index = jnp.arange(segments.shape[1])
    return _within(index[:, None], index[None, :], window) & segment_mask(segments)


def cache_mask(positions: Array, cached: Array, window: int | None = None) -> Array:
    """New tokens see what a cache holds at their own and earlier positions.

    Args:
        positions: (B, T) int32 of the new tokens; negative for padding.
        cached: (B, S) int32, the position in every slot of the cache, the new tokens' included;
            negative where it holds nothing.
        window: as in ``causal_mask``.

    Returns:
        (B, 1, T, S) bool.
    """
    queries, keys = positions[:, :, None], cached[:, None, :]
    return (_within(queries, keys, window) & (keys >= 0))[:, None]


def _within(queries: Array, keys: Array, window: int | None) -> Array:
    causal = keys <= queries
    return causal if window is None else causal & (queries - keys < window)
