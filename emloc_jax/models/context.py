"""What every block of a stack reads besides the residual stream: rotary tables and the mask."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.masks import cache_mask, causal_mask
from emloc_jax.models.rope import rope_frequencies, rope_tables

__all__ = ["Context", "cache_context", "sequence_context"]


class Context(NamedTuple):
    """The part of a forward pass that is the same for all blocks; computed once.

    Attributes:
        cos: (B or 1, T, 1, head_dim / 2) fp32.
        sin: the same.
        mask: (B, 1, T, S) bool, True where a query may look; None: causal within one segment.
    """

    cos: Array
    sin: Array
    mask: Array | None


def sequence_context(
    config: DecoderConfig, length: int, positions: Array | None, segments: Array | None
) -> Context:
    """Context of whole sequences.

    Args:
        config: the decoder's shape.
        length: T.
        positions: (B, T) int32, or None for 0, 1, … in every row.
        segments: (B, T) int32, 0 for padding; a token sees earlier tokens of its own segment.
            None: every row is one segment.

    Returns:
        The context; with ``segments`` None it holds no mask.
    """
    if positions is None:
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    cos, sin = _tables(config, positions)
    if segments is None:
        return Context(cos, sin, None)
    return Context(cos, sin, causal_mask(segments, config.sliding_window))


def cache_context(config: DecoderConfig, positions: Array, cached: Array) -> Context:
    """Context of new tokens that look into a cache.

    Args:
        config: the decoder's shape.
        positions: (B, T) int32 of the new tokens; negative for padding.
        cached: (B, S) int32, the position in every slot of the cache, the new tokens' included;
            negative where it holds nothing.

    Returns:
        The context, with a mask (B, 1, T, S).
    """
    cos, sin = _tables(config, positions)
    return Context(cos, sin, cache_mask(positions, cached, config.sliding_window))


def _tables(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    scaling = config.rope_scaling
    return rope_tables(rope_frequencies(config.head_dim, config.rope_theta, scaling), positions)
