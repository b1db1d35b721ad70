"""One block of the decoder: attention and a gated MLP, each behind a norm and beside a shortcut."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.attention import Attention
from emloc_jax.models.cache import KeysValues
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.context import Context

__all__ = ["DecoderBlock"]


class GatedMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU; Shazeer 2020, arXiv 2002.05202).

    Attributes:
        config: the decoder's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the parts."""
        c = self.config
        dense: dict[str, Any] = dict(
            use_bias=c.mlp_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(c.initializer_range),
        )
        self.gate_proj = nn.Dense(c.intermediate_size, **dense)
        self.up_proj = nn.Dense(c.intermediate_size, **dense)
        self.down_proj = nn.Dense(c.hidden_size, **dense)

    def __call__(self, x: Array) -> Array:
        """The MLP of every token by itself: (B, T, D) to (B, T, D)."""
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Attributes:
        config: the decoder's shape.
        dtype: of the computation and of the residual stream.
        param_dtype: of the parameters.
        attention_implementation: see ``Attention``.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.input_layernorm = nn.RMSNorm(epsilon=c.rms_norm_eps, **dtypes)
        self.self_attn = Attention(c, implementation=self.attention_implementation, **dtypes)
        self.post_attention_layernorm = nn.RMSNorm(epsilon=c.rms_norm_eps, **dtypes)
        self.mlp = GatedMlp(c, **dtypes)

    def __call__(self, x: Array, context: Context) -> Array:
        """The block on whole sequences.

        Args:
            x: (B, T, D).
            context: rotary tables and mask.

        Returns:
            (B, T, D).
        """
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))

    def decode(
        self, x: Array, cache: KeysValues, layer: int | Array, slot: Array, context: Context
    ) -> tuple[Array, KeysValues]:
        """The block on new tokens; arguments and results are those of ``Attention.decode``."""
        mixed, cache = self.self_attn.decode(self.input_layernorm(x), cache, layer, slot, context)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache
