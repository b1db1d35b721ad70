"""Grouped-query self-attention with rotary embeddings, with and without a key/value cache."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.attend import attend
from emloc_jax.models.cache import KeysValues, write_cache
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.context import Context
from emloc_jax.models.rope import apply_rope

__all__ = ["Attention"]


class Attention(nn.Module):
    """``o_proj(softmax(q kᵀ / √head_dim) v)``; q, k and v read the very same input.

    Grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245.

    Attributes:
        config: the decoder's shape.
        dtype: of the products; rope, norms and the softmax are fp32 whatever it is.
        param_dtype: of the parameters.
        implementation: of ``jax.nn.dot_product_attention``; None is XLA's own, ``'cudnn'`` the
            fused one of NVIDIA GPUs (bf16 only).
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    implementation: Any = None

    def setup(self):
        """Declares the projections."""
        c = self.config
        dense: dict[str, Any] = dict(
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(c.initializer_range),
        )
        keys = c.num_kv_heads * c.head_dim
        self.q_proj = nn.Dense(c.num_heads * c.head_dim, use_bias=c.qkv_bias, **dense)
        self.k_proj = nn.Dense(keys, use_bias=c.qkv_bias, **dense)
        self.v_proj = nn.Dense(keys, use_bias=c.qkv_bias, **dense)
        self.o_proj = nn.Dense(c.hidden_size, use_bias=c.o_bias, **dense)
        if c.qk_norm:
            norm: dict[str, Any] = dict(
                epsilon=c.rms_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype
            )
            self.q_norm, self.k_norm = nn.RMSNorm(**norm), nn.RMSNorm(**norm)

    def __call__(self, x: Array, context: Context) -> Array:
        """Attention of a whole sequence to itself.

        Args:
            x: (B, T, D), normalised.
            context: rotary tables and mask.

        Returns:
            (B, T, D).
        """
        queries, keys, values = self._project(x, context)
        return self._attend(queries, keys, values, context)

    def decode(
        self, x: Array, cache: KeysValues, layer: int | Array, slot: Array, context: Context
    ) -> tuple[Array, KeysValues]:
        """Attention of new tokens to a cache that they are first written into.

        Args:
            x: (B, T, D), the new tokens, normalised.
            cache: keys and values of all layers, (L, B, S, num_kv_heads, head_dim) each; only the
                new slots of this layer are written, in place inside a compiled loop.
            layer: index of this layer.
            slot: () int32, where in S the new tokens go.
            context: rotary tables, and a mask (B, 1, T, S).

        Returns:
            ((B, T, D), the cache with the new tokens).
        """
        queries, *new = self._project(x, context)
        cache, keys, values = write_cache(cache, new, layer, slot)
        return self._attend(queries, keys, values, context), cache

    def _project(self, x: Array, context: Context) -> tuple[Array, Array, Array]:
        c, (batch, length, _) = self.config, x.shape
        queries = self.q_proj(x).reshape(batch, length, c.num_heads, c.head_dim)
        keys = self.k_proj(x).reshape(batch, length, c.num_kv_heads, c.head_dim)
        values = self.v_proj(x).reshape(batch, length, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        cos, sin = context.cos, context.sin
        return apply_rope(queries, cos, sin), apply_rope(keys, cos, sin), values

    def _attend(self, queries: Array, keys: Array, values: Array, context: Context) -> Array:
        mixed = attend(
            queries,
            keys,
            values,
            context.mask,
            causal=True,
            window=self.config.sliding_window,
            implementation=self.implementation,
        )
        return self.o_proj(mixed)
