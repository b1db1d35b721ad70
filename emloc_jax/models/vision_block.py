"""One block of an image encoder: attention in both directions and a plain MLP, norms before."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.attend import attend
from emloc_jax.models.plain_layers import PlainMlp, new_dense, new_norm
from emloc_jax.models.vision_config import VisionConfig

__all__ = ["VisionBlock"]


class VisionAttention(nn.Module):
    """``output(softmax(q kᵀ / √head_dim) v)``; q, k and v read the very same input.

    Attributes:
        config: the encoder's shape.
        dtype: of the products; the softmax is fp32 whatever it is.
        param_dtype: of the parameters.
        implementation: of ``jax.nn.dot_product_attention``.
    """

    config: VisionConfig
    dtype: Any
    param_dtype: Any
    implementation: str | None = None

    def setup(self):
        """Declares the projections, and norms of queries and keys if there are any."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        for name in ("query", "key", "value"):
            setattr(self, name, new_dense(c, c.hidden_size, dtypes, use_bias=c.qkv_bias))
        self.output = new_dense(c, c.hidden_size, dtypes)
        if c.qk_norm:
            # transformers leaves the epsilon of these at its default, 1e-6.
            self.query_norm = nn.RMSNorm(epsilon=1e-6, **dtypes)
            self.key_norm = nn.RMSNorm(epsilon=1e-6, **dtypes)

    def __call__(self, x: Array) -> Array:
        """Attention of whole images, (B, N, D)."""
        queries, keys, values = self.query(x), self.key(x), self.value(x)
        if self.config.qk_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        queries, keys, values = (part.reshape(heads) for part in (queries, keys, values))
        how = self.implementation
        return self.output(attend(queries, keys, values, None, causal=False, implementation=how))


class VisionBlock(nn.Module):
    """``x + s ⊙ attention(norm(x))``, then ``x + t ⊙ mlp(norm(x))``.

    The vectors s and t are InternViT's; elsewhere they are 1.

    Attributes:
        config: the encoder's shape.
        dtype: of the computation and of the residual stream.
        param_dtype: of the parameters.
        attention_implementation: see ``VisionAttention``.
    """

    config: VisionConfig
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        for name in ("attention_norm", "mlp_norm"):
            rms = c.norm_type == "rms_norm"
            norm = nn.RMSNorm(epsilon=c.layer_norm_eps, **dtypes) if rms else new_norm(c, dtypes)
            setattr(self, name, norm)
        self.attention = VisionAttention(c, implementation=self.attention_implementation, **dtypes)
        self.mlp = PlainMlp(c, inner="intermediate", outer="output", **dtypes)
        if c.layer_scale:
            shape, small = (c.hidden_size,), nn.initializers.constant(0.1)
            self.attention_scale = self.param("attention_scale", small, shape, self.param_dtype)
            self.mlp_scale = self.param("mlp_scale", small, shape, self.param_dtype)

    def __call__(self, x: Array, context: Any) -> Array:
        """The block on whole images.

        Args:
            x: (B, N, D).
            context: nothing: all patches of an image see one another.

        Returns:
            (B, N, D).
        """
        mixed = self.attention(self.attention_norm(x))
        x = x + (mixed * self.attention_scale.astype(x.dtype) if self.config.layer_scale else mixed)
        mixed = self.mlp(self.mlp_norm(x))
        return x + (mixed * self.mlp_scale.astype(x.dtype) if self.config.layer_scale else mixed)
