"""One block of the decoder: attention and a gated MLP, each behind a norm and beside a shortcut."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.attention import Attention
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.pre_norm_block import PreNormBlock

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


class DecoderBlock(PreNormBlock):
    """``x + self_attn(input_layernorm(x))``, then ``x + mlp(post_attention_layernorm(x))``."""

    config: DecoderConfig

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.input_layernorm = nn.RMSNorm(epsilon=c.rms_norm_eps, **dtypes)
        self.self_attn = Attention(c, implementation=self.attention_implementation, **dtypes)
        self.post_attention_layernorm = nn.RMSNorm(epsilon=c.rms_norm_eps, **dtypes)
        self.mlp = GatedMlp(c, **dtypes)

    @nn.nowrap
    def parts(self) -> tuple[nn.RMSNorm, Attention, nn.RMSNorm, GatedMlp]:
        """The four parts."""
        return self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp
