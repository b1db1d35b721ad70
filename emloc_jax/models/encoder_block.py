"""One block of BERT: attention in both directions and a plain MLP, norms behind the shortcuts."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.attend import attend
from emloc_jax.models.encoder_config import EncoderConfig
from emloc_jax.models.plain_layers import PlainMlp, new_dense, new_norm

__all__ = ["EncoderBlock"]


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
        self.query = new_dense(c, c.hidden_size, dtypes)
        self.key = new_dense(c, c.hidden_size, dtypes)
        self.value = new_dense(c, c.hidden_size, dtypes)
        self.output = new_dense(c, c.hidden_size, dtypes)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Attention of whole sequences, (B, T, D); ``mask`` as in ``attend``."""
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        queries, keys, values = (
            projection(x).reshape(heads) for projection in (self.query, self.key, self.value)
        )
        how = self.implementation
        return self.output(attend(queries, keys, values, mask, causal=False, implementation=how))


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
        self.attention_norm = new_norm(c, dtypes)
        self.mlp = PlainMlp(c, inner="intermediate", outer="output", **dtypes)
        self.mlp_norm = new_norm(c, dtypes)

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
