"""Llama 3.1's rope scaling, recovered from the table of factors that GGUF stores instead of it."""

import math
from typing import Any

import numpy as np

from emloc_jax.errors import UnsupportedArchitectureError

__all__ = ["llama3_scaling"]

# The same in every Llama 3.1, 3.2 and 3.3; GGUF does not say them.
_LOW, _HIGH = 1.0, 4.0


def llama3_scaling(factors: np.ndarray, theta: float, original: int) -> dict[str, Any]:
    """The `rope_scaling` of a `config.json` whose frequencies are divided by these factors.

    A frequency is kept where its wavelength is below `original / 4`, divided by `factor` where it
    is above `original`, and blended between. The recovered values are used only if they give the
    stored table back.

    Args:
      factors: (head_dim / 2,), the tensor `rope_freqs.weight`.
      theta: rope base.
      original: context before the scaling.

    Raises:
      UnsupportedArchitectureError: the table is of another kind.

    >>> llama3_scaling(np.array([1.0, 8.0]), theta=1e10, original=64)["factor"]
    8.0
    """
    factor = float(factors[-1])
    half = len(factors)
    turns = original / (2 * math.pi * theta ** (np.arange(half) / half))  # per original context
    smooth = np.clip((turns - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    again = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(again, factors, rtol=1e-4):
        raise UnsupportedArchitectureError(
            "This GGUF file carries a table of rope factors (rope_freqs.weight) that is not Llama "
            "3.1's. Take the model's safetensors checkpoint instead."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": original,
    }
