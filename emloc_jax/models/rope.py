"""Rotary position embeddings: frequencies with their scalings, and the rotation, all in fp32."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["RopeScaling", "apply_rope", "rope_frequencies", "rope_tables"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to reach a longer context.

    Attributes:
        kind: ``'linear'`` (all frequencies divided by ``factor``; Chen et al. 2023,
            arXiv 2306.15595) or ``'llama3'`` (long wavelengths only; Llama 3.1).
        factor: by how much.
        low_freq_factor: llama3: wavelengths above ``original / low_freq_factor`` are divided.
        high_freq_factor: llama3: wavelengths below ``original / high_freq_factor`` are kept.
        original_max_position_embeddings: llama3: the context before stretching.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each pair of features, ``theta^(-2i/head_dim)``, then scaled.

    Args:
        head_dim: width of a head.
        theta: base.
        scaling: see ``RopeScaling``.

    Returns:
        (head_dim / 2,) fp32.

    Example:
        >>> from emloc_jax.models.rope import RopeScaling, rope_frequencies
        >>> rope_frequencies(4, 100.0).tolist()
        [1.0, 0.10000000149011612]
        >>> rope_frequencies(4, 100.0, RopeScaling("linear", 2.0))[0].item()
        0.5
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        frequencies = _llama3_frequencies(frequencies, scaling)
    return frequencies.astype(np.float32)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None  # read_rope saw to it
    turns = original * frequencies / (2 * np.pi)  # full turns within the original context
    # keep = 1 above `high` turns, 0 below `low` turns, linear between.
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rope_tables(frequencies: np.ndarray, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of the rotation angles.

    Args:
        frequencies: (head_dim / 2,).
        positions: (B, T) int; negative positions (padding) count as 0.

    Returns:
        (cos, sin), each (B, T, 1, head_dim / 2) fp32, ready to broadcast over heads.
    """
    angles = jnp.maximum(positions, 0).astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates feature ``i`` with feature ``i + head_dim/2`` (the half-split order of HF).

    Rotary embeddings: Su et al. 2021, arXiv 2104.09864.

    Args:
        x: (B, T, heads, head_dim).
        cos: (B or 1, T, 1, head_dim / 2) fp32.
        sin: the same.

    Returns:
        (B, T, heads, head_dim) in the dtype of ``x``; the arithmetic is fp32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)
