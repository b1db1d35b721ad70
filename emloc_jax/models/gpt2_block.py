"""One block of GPT-2: attention with one fused projection, and a plain MLP, norms in front."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.models.activations import activation
from emloc_jax.models.attend import attend
from emloc_jax.models.cache import KeysValues, write_cache
from emloc_jax.models.gpt2_config import Gpt2Config

__all__ = ["Gpt2Block"]


def _dense(config: Gpt2Config, dtypes: dict[str, Any], features: int, depth: int = 1) -> nn.Dense:
    """A dense layer; the two that end a branch start smaller by the root of their number."""
    deviation = config.initializer_range / math.sqrt(depth)
    return nn.Dense(features, kernel_init=nn.initializers.normal(deviation), **dtypes)


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
        self.c_attn = _dense(c, dtypes, 3 * c.hidden_size)
        self.c_proj = _dense(c, dtypes, c.hidden_size, 2 * c.num_layers)

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


class Gpt2Mlp(nn.Module):
    """``c_proj(activation(c_fc(x)))``.

    Attributes:
        config: the model's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    config: Gpt2Config
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the projections."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.c_fc = _dense(c, dtypes, c.intermediate_size)
        self.c_proj = _dense(c, dtypes, c.hidden_size, 2 * c.num_layers)

    def __call__(self, x: Array) -> Array:
        """The MLP of every token by itself: (B, T, D) to (B, T, D)."""
        return self.c_proj(activation(self.config.hidden_act)(self.c_fc(x)))


class Gpt2Block(nn.Module):
    """``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``.

    Attributes:
        config: the model's shape.
        dtype: of the computation and of the residual stream.
        param_dtype: of the parameters.
        attention_implementation: see ``Gpt2Attention``.
    """

    config: Gpt2Config
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm: dict[str, Any] = dict(epsilon=c.layer_norm_eps, use_fast_variance=False, **dtypes)
        self.ln_1 = nn.LayerNorm(**norm)
        self.attn = Gpt2Attention(c, implementation=self.attention_implementation, **dtypes)
        self.ln_2 = nn.LayerNorm(**norm)
        self.mlp = Gpt2Mlp(c, **dtypes)

    def __call__(self, x: Array, context: Array | None) -> Array:
        """The block on whole sequences.

        Args:
            x: (B, T, D).
            context: the mask, (B, 1, T, T) bool or None.

        Returns:
            (B, T, D).
        """
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))

    def decode(
        self, x: Array, cache: KeysValues, layer: int | Array, slot: Array, context: Array
    ) -> tuple[Array, KeysValues]:
        """The block on new tokens; arguments and results are those of ``Gpt2Attention.decode``."""
        mixed, cache = self.attn.decode(self.ln_1(x), cache, layer, slot, context)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), cache
