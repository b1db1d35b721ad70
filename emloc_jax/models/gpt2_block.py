"""One block of GPT-2: attention with one fused projection, and a plain MLP, norms in front."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.models.attend import attend
from emloc_jax.models.cache import KeysValues, write_cache
from emloc_jax.models.gpt2_config import Gpt2Config
from emloc_jax.models.plain_layers import PlainMlp, new_dense, new_norm
from emloc_jax.models.pre_norm_block import PreNormBlock

__all__ = ["Gpt2Block"]


class Gpt2Attention(nn.Module):
    """``c_proj(softmax(q kᵀ / √head_dim) v)`` with ``[q, k, v] = c_attn(x)``.

    Attributes:
        config: the model's shape.
        dtype: of the products; the softmax is fp32 whatever it is.
        param_dtype: of the parameters.
        implementation: of ``jax.nn.dot_product_attention``.
    """

    config: Gpt2Config
    dtype: Any
    param_dtype: Any
    implementation: str | None = None

    def setup(self):
        """Declares the projections."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.c_attn = new_dense(c, 3 * c.hidden_size, dtypes)
        # What ends a branch starts smaller by the root of the number of branches.
        self.c_proj = new_dense(c, c.hidden_size, dtypes, depth=2 * c.num_layers)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Attention of whole sequences, (B, T, D), normalised; ``mask`` as in ``attend``."""
        return self._attend(*self._project(x), mask)

    def decode(
        self, x: Array, cache: KeysValues, layer: int | Array, slot: Array, mask: Array
    ) -> tuple[Array, KeysValues]:
        """Attention of new tokens to a cache, as ``Attention.decode``; the context is the mask."""
        queries, *new = self._project(x)
        cache, keys, values = write_cache(cache, new, layer, slot)
        return self._attend(queries, keys, values, mask), cache

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        queries, keys, values = jnp.split(self.c_attn(x), 3, axis=-1)
        return queries.reshape(heads), keys.reshape(heads), values.reshape(heads)

    def _attend(self, queries: Array, keys: Array, values: Array, mask: Array | None) -> Array:
        how = self.implementation
        return self.c_proj(attend(queries, keys, values, mask, causal=True, implementation=how))


class Gpt2Block(PreNormBlock):
    """``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``; the context is the mask."""

    config: Gpt2Config

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.ln_1 = new_norm(c, dtypes)
        self.attn = Gpt2Attention(c, implementation=self.attention_implementation, **dtypes)
        self.ln_2 = new_norm(c, dtypes)
        self.mlp = PlainMlp(c, inner="c_fc", outer="c_proj", depth=2 * c.num_layers, **dtypes)

    @nn.nowrap
    def parts(self) -> tuple[nn.LayerNorm, Gpt2Attention, nn.LayerNorm, PlainMlp]:
        """The four parts."""
        return self.ln_1, self.attn, self.ln_2, self.mlp
