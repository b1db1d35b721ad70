"""The two kinds of FLUX blocks: text and image with weights of their own, or with one set."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.models.flux_config import FluxConfig
from emloc_jax.models.flux_layers import FluxContext, JointAttention, Modulation, norm

__all__ = ["DoubleBlock", "SingleBlock"]


class GeluMlp(nn.Module):
    """``outer(gelu(inner(x)))`` with the tanh form of gelu.

    Attributes:
        config: the model's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    config: FluxConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the layers."""
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.inner = nn.Dense(self.config.intermediate_size, **dtypes)
        self.outer = nn.Dense(self.config.hidden_size, **dtypes)

    def __call__(self, x: Array) -> Array:
        """(B, T, D) to (B, T, D)."""
        return self.outer(nn.gelu(self.inner(x), approximate=True))


class DoubleBlock(nn.Module):
    """Joint attention, then an MLP each, for two streams with weights of their own.

    The block of Esser et al. 2024 (arXiv 2403.03206), with rotary positions. Both parts of a
    stream are ``x + gate · part((1 + scale) · norm(x) + shift)``.

    Attributes:
        config: the model's shape.
        dtype: of the computation and of the residual streams.
        param_dtype: of the parameters.
        attention_implementation: see ``JointAttention``.
    """

    config: FluxConfig
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts; ``*_context`` are the text's."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.norm1 = Modulation(6, c.hidden_size, **dtypes)
        self.norm1_context = Modulation(6, c.hidden_size, **dtypes)
        how = self.attention_implementation
        self.attn = JointAttention(c, double=True, implementation=how, **dtypes)
        self.ff = GeluMlp(c, **dtypes)
        self.ff_context = GeluMlp(c, **dtypes)

    def __call__(self, streams: tuple[Array, Array], context: FluxContext) -> tuple[Array, Array]:
        """The block on whole sequences.

        Args:
            streams: text (B, S, D) and image (B, T, D).
            context: of the pass.

        Returns:
            The same two.
        """
        text, image = streams
        shift, scale, gate, *rest = self.norm1(context.conditioning)
        text_shift, text_scale, text_gate, *text_rest = self.norm1_context(context.conditioning)
        gathered, text_gathered = self.attn(
            _modulate(image, shift, scale),
            context,
            _modulate(text, text_shift, text_scale),
        )
        image, text = image + gate * gathered, text + text_gate * text_gathered
        return _widen(self.ff_context, text, text_rest), _widen(self.ff, image, rest)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, of text and image tokens alike, behind one projection.

    ``x + gate · proj_out([attention(y), gelu(proj_mlp(y))])`` with
    ``y = (1 + scale) · norm(x) + shift``; parallel layers as in Dehghani et al. 2023
    (arXiv 2302.05442).

    Attributes:
        config: the model's shape.
        dtype: of the computation and of the residual stream.
        param_dtype: of the parameters.
        attention_implementation: see ``JointAttention``.
    """

    config: FluxConfig
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.norm = Modulation(3, c.hidden_size, **dtypes)
        how = self.attention_implementation
        self.attn = JointAttention(c, double=False, implementation=how, **dtypes)
        self.proj_mlp = nn.Dense(c.intermediate_size, **dtypes)
        self.proj_out = nn.Dense(c.hidden_size, **dtypes)

    def __call__(self, x: Array, context: FluxContext) -> Array:
        """The block on whole sequences.

        Args:
            x: (B, S + T, D), text first.
            context: of the pass.

        Returns:
            (B, S + T, D).
        """
        shift, scale, gate = self.norm(context.conditioning)
        y = _modulate(x, shift, scale)
        widened = nn.gelu(self.proj_mlp(y), approximate=True)
        return x + gate * self.proj_out(jnp.concatenate((self.attn(y, context), widened), axis=-1))


def _modulate(x: Array, shift: Array, scale: Array) -> Array:
    return norm(x) * (1 + scale) + shift


def _widen(mlp: GeluMlp, x: Array, modulation: list[Array]) -> Array:
    shift, scale, gate = modulation
    return x + gate * mlp(_modulate(x, shift, scale))
