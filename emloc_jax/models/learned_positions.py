"""Position ids for models whose positions are rows of a learned table."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from emloc_jax.errors import DataError

__all__ = ["position_ids"]


def position_ids(tokens: Array, positions: Array | None, context: int) -> Array:
    """The given positions, or 0, 1, … in every row; padding's negative ones become 0.

    Args:
        tokens: (B, T) int32.
        positions: (B, T) int32 or None.
        context: number of positions that the model has learned.

    Returns:
        (B or 1, T) int32, at least 0.

    Raises:
        DataError: no positions are given and the rows are longer than the context. (Given ones
            are not looked at under jit; the caller keeps them below ``context``.)

    Example:
        >>> import jax.numpy as jnp
        >>> from emloc_jax.models.learned_positions import position_ids
        >>> position_ids(jnp.zeros((2, 3), int), None, context=8).tolist()
        [[0, 1, 2]]
    """
    if positions is not None:
        return jnp.maximum(positions, 0)
    length = tokens.shape[1]
    if length > context:
        raise DataError(
            f"Rows of {length} tokens were given, but the model has learned {context} positions. "
            "Shorten them, or give positions that start again for every packed text."
        )
    return jnp.arange(length, dtype=jnp.int32)[None]
