"""The layers of GPT-2 and of all encoders: dense layers and norms with biases, a plain MLP."""

from __future__ import annotations

import math
from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.activations import activation

__all__ = ["PlainMlp", "new_dense", "new_norm"]


def new_dense(
    config: Any, features: int, dtypes: dict[str, Any], *, depth: int = 1, use_bias: bool = True
) -> nn.Dense:
    """A dense layer that starts normal, with ``initializer_range`` over the root of ``depth``.

    Args:
        config: of the model.
        features: d_out.
        dtypes: its ``dtype`` and ``param_dtype``.
        depth: how many such layers add up to the residual stream, where the family counts them.
        use_bias: whether it has a bias.
    """
    deviation = config.initializer_range / math.sqrt(depth)
    normal = nn.initializers.normal(deviation)
    return nn.Dense(features, use_bias=use_bias, kernel_init=normal, **dtypes)


def new_norm(config: Any, dtypes: dict[str, Any]) -> nn.LayerNorm:
    """A layer norm; with an epsilon of 1e-12 the variance must not be a difference of means."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, **dtypes)


class PlainMlp(nn.Module):
    """``outer(activation(inner(x)))``, two dense layers by the names of the family.

    Attributes:
        config: the model's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
        inner: name of the layer that widens.
        outer: name of the layer that comes back.
        depth: of the second, see ``new_dense``.
    """

    config: Any
    dtype: Any
    param_dtype: Any
    inner: str
    outer: str
    depth: int = 1

    def setup(self):
        """Declares the projections."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        setattr(self, self.inner, new_dense(c, c.intermediate_size, dtypes))
        setattr(self, self.outer, new_dense(c, c.hidden_size, dtypes, depth=self.depth))

    def __call__(self, x: Array) -> Array:
        """The MLP of every token by itself: (B, T, D) to (B, T, D)."""
        widened = getattr(self, self.inner)(x)
        return getattr(self, self.outer)(activation(self.config.hidden_act)(widened))
