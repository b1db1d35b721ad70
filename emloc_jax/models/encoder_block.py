"""One block of BERT: attention in both directions and a plain MLP, norms behind the shortcuts."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.activations import activation
from emloc_jax.models.attend import attend
from emloc_jax.models.encoder_config import EncoderConfig

__all__ = ["EncoderBlock", "encoder_dense", "encoder_norm"]


def encoder_dense(config: EncoderConfig, features: int, dtypes: dict[str, Any]) -> nn.Dense:
    """A dense layer with the family's initialisation."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, kernel_init=init, **dtypes)


def encoder_norm(config: EncoderConfig, dtypes: dict[str, Any]) -> nn.LayerNorm:
    """A layer norm; with an epsilon of 1e-12 the variance must not be a difference of means."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, **dtypes)


class EncoderAttention(nn.Module):
    """``output(softmax(q kᵀ / √head_dim) v)``; q, k and v read the very same input.

    Attributes:
        config: the encoder's shape.
        dtype: of the products; the softmax is fp32 whatever it is.
        param_dtype: of the parameters.
        implementation: of ``jax.nn.dot_product_attention``.
    """

    config: EncoderConfig
    dtype: Any
    param_dtype: Any
    implementation: str | None = None

    def setup(self):
        """Declares the projections."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.query = encoder_dense(c, c.hidden_size, dtypes)
        self.key = encoder_dense(c, c.hidden_size, dtypes)
        self.value = encoder_dense(c, c.hidden_size, dtypes)
        self.output = encoder_dense(c, c.hidden_size, dtypes)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Attention of whole sequences, (B, T, D); ``mask`` as in ``attend``."""
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        queries, keys, values = (
            projection(x).reshape(heads) for projection in (self.query, self.key, self.value)
        )
        how = self.implementation
        return self.output(attend(queries, keys, values, mask, causal=False, implementation=how))


class EncoderMlp(nn.Module):
    """``output(activation(intermediate(x)))``.

    Attributes:
        config: the encoder's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the projections."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.intermediate = encoder_dense(c, c.intermediate_size, dtypes)
        self.output = encoder_dense(c, c.hidden_size, dtypes)

    def __call__(self, x: Array) -> Array:
        """The MLP of every token by itself: (B, T, D) to (B, T, D)."""
        return self.output(activation(self.config.hidden_act)(self.intermediate(x)))


class EncoderBlock(nn.Module):
    """``attention_norm(x + attention(x))``, then ``mlp_norm(x + mlp(x))``.

    Attributes:
        config: the encoder's shape.
        dtype: of the computation and of the residual stream.
        param_dtype: of the parameters.
        attention_implementation: see ``EncoderAttention``.
    """

    config: EncoderConfig
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.attention = EncoderAttention(c, implementation=self.attention_implementation, **dtypes)
        self.attention_norm = encoder_norm(c, dtypes)
        self.mlp = EncoderMlp(c, **dtypes)
        self.mlp_norm = encoder_norm(c, dtypes)

    def __call__(self, x: Array, context: Array | None) -> Array:
        """The block on whole sequences.

        Args:
            x: (B, T, D).
            context: the mask, (B, 1, T, T) bool or None.

        Returns:
            (B, T, D).
        """
        x = self.attention_norm(x + self.attention(x, context))
        return self.mlp_norm(x + self.mlp(x))
