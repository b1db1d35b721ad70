"""From patches to tokens of a language model: neighbours side by side, then two dense layers."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.activations import activation

__all__ = ["Projector", "pixel_shuffle"]


def pixel_shuffle(patches: Array, factor: int) -> Array:
    """Puts ``factor × factor`` neighbouring patches side by side into one feature.

    Args:
        patches: (B, rows, columns, D).
        factor: divides rows and columns.

    Returns:
        (B, rows / factor, columns / factor, factor² · D); row by row of a neighbourhood.

    Example:
        >>> import jax.numpy as jnp
        >>> from emloc_jax.models.projector import pixel_shuffle
        >>> pixel_shuffle(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0, 0, 1].tolist()
        [2, 3, 6, 7]
    """
    batch, rows, columns, width = patches.shape
    x = patches.reshape(batch, rows // factor, factor, columns // factor, factor, width)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows // factor, columns // factor, factor**2 * width)


class Projector(nn.Module):
    """``linear_2(activation(linear_1(norm(x))))``.

    Attributes:
        features: width of the language model.
        hidden_act: name of the activation.
        initializer_range: standard deviation of fresh kernels.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    features: int
    hidden_act: str
    initializer_range: float
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the parts."""
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(self.initializer_range)
        # transformers leaves the epsilon of this norm at torch's default.
        self.norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, **dtypes)
        self.linear_1 = nn.Dense(self.features, kernel_init=normal, **dtypes)
        self.linear_2 = nn.Dense(self.features, kernel_init=normal, **dtypes)

    def __call__(self, x: Array) -> Array:
        """(..., width of the shuffled patches) to (..., features)."""
        return self.linear_2(activation(self.hidden_act)(self.linear_1(self.norm(x))))
