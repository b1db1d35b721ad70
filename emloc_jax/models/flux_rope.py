"""Rotary positions over several axes, as FLUX has them: an index, a row and a column."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from emloc_jax.models.rope import rope_frequencies

__all__ = ["apply_axis_rope", "axis_rope_tables"]

_THETA = 10000.0


def axis_rope_tables(ids: Array, axes_dims: Sequence[int]) -> tuple[Array, Array]:
    """Cosines and sines of the rotation angles of every token.

    A head's features are shared out over the axes; axis ``a`` turns its ``axes_dims[a] / 2`` pairs
    by ``ids[..., a] · θ^(-2i/axes_dims[a])`` with θ = 10000.

    Args:
        ids: (T, axes) or (B, T, axes) numbers, the position on each axis.
        axes_dims: features of each axis.

    Returns:
        (cos, sin), each (1 or B, T, 1, head_dim / 2) fp32, ready to broadcast over heads.

    Example:
        >>> import jax.numpy as jnp
        >>> from emloc_jax.models.flux_rope import axis_rope_tables
        >>> cos, sin = axis_rope_tables(jnp.zeros((5, 3)), (4, 6, 6))
        >>> cos.shape, float(cos.min()), float(sin.max())
        ((1, 5, 1, 8), 1.0, 0.0)
    """
    ids = ids[None] if ids.ndim == 2 else ids
    parts = [
        ids[..., axis, None].astype(jnp.float32) * rope_frequencies(size, _THETA)
        for axis, size in enumerate(axes_dims)
    ]
    angles = jnp.concatenate(parts, axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_axis_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates feature ``2i`` with feature ``2i + 1`` (the interleaved order of the RoPE paper).

    Rotary embeddings: Su et al. 2021, arXiv 2104.09864.

    Args:
        x: (B, T, heads, head_dim).
        cos: (B or 1, T, 1, head_dim / 2) fp32.
        sin: the same.

    Returns:
        (B, T, heads, head_dim) in the dtype of ``x``; the arithmetic is fp32.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
