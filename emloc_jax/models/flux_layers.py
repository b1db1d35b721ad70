"""The parts that both kinds of FLUX blocks are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.models.attend import attend
from emloc_jax.models.flux_config import FluxConfig
from emloc_jax.models.flux_rope import apply_axis_rope

__all__ = ["FluxContext", "JointAttention", "Modulation", "TwoLayerMlp", "norm", "timestep_waves"]


class FluxContext(NamedTuple):
    """What every block reads besides the residual streams.

    Attributes:
        conditioning: (B, D), silu of the embedded timestep, guidance and pooled prompt.
        cos: (1 or B, S + T, 1, head_dim / 2) fp32, text tokens first.
        sin: the same.
    """

    conditioning: Array
    cos: Array
    sin: Array


def norm(x: Array) -> Array:
    """``(x - mean) / √(variance + 1e-6)`` over the last axis, in fp32; back in the dtype of x."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return (centred / jnp.sqrt(variance + 1e-6)).astype(x.dtype)


def timestep_waves(values: Array, width: int = 256) -> Array:
    """Cosines, then sines, of a number at frequencies from 1 down to nearly 1/10000.

    Args:
        values: (B,), timesteps or guidance scales times 1000.
        width: W, even.

    Returns:
        (B, W) fp32.

    Example:
        >>> import jax.numpy as jnp
        >>> from emloc_jax.models.flux_layers import timestep_waves
        >>> timestep_waves(jnp.zeros(1), 4).tolist()
        [[1.0, 1.0, 0.0, 0.0]]
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles = values.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), axis=-1)


class TwoLayerMlp(nn.Module):
    """``linear_2(silu(linear_1(x)))``, which embeds one of the conditions.

    Attributes:
        features: D.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    features: int
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the layers."""
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.linear_1 = nn.Dense(self.features, **dtypes)
        self.linear_2 = nn.Dense(self.features, **dtypes)

    def __call__(self, x: Array) -> Array:
        """(B, n) to (B, D)."""
        return self.linear_2(nn.silu(self.linear_1(x)))


class Modulation(nn.Module):
    """``count`` vectors that the conditioning gives: shifts, scales and gates (adaLN-Zero).

    Peebles and Xie 2022, arXiv 2212.09748: it starts at zero, so that a fresh block is the
    identity.

    Attributes:
        count: how many.
        features: width of each, D.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    count: int
    features: int
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the layer."""
        self.linear = nn.Dense(
            self.count * self.features,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def __call__(self, conditioning: Array) -> list[Array]:
        """(B, D) to ``count`` arrays (B, 1, D)."""
        return jnp.split(self.linear(conditioning)[:, None], self.count, axis=-1)


class JointAttention(nn.Module):
    """Attention over text and image tokens at once, each head's q and k behind an RMS norm.

    Attributes:
        config: the model's shape.
        dtype: of the products; norms, rotation and softmax are fp32 whatever it is.
        param_dtype: of the parameters.
        double: text has projections and norms of its own (``add_*``), and both get an output
            projection. Else one set serves all tokens, without an output projection.
        implementation: of ``jax.nn.dot_product_attention``.
    """

    config: FluxConfig
    dtype: Any
    param_dtype: Any
    double: bool
    implementation: str | None = None

    def setup(self):
        """Declares the projections and norms."""
        width = self.config.hidden_size
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.to_q = nn.Dense(width, **dtypes)
        self.to_k = nn.Dense(width, **dtypes)
        self.to_v = nn.Dense(width, **dtypes)
        self.norm_q = nn.RMSNorm(epsilon=1e-6, **dtypes)
        self.norm_k = nn.RMSNorm(epsilon=1e-6, **dtypes)
        if self.double:
            self.add_q_proj = nn.Dense(width, **dtypes)
            self.add_k_proj = nn.Dense(width, **dtypes)
            self.add_v_proj = nn.Dense(width, **dtypes)
            self.norm_added_q = nn.RMSNorm(epsilon=1e-6, **dtypes)
            self.norm_added_k = nn.RMSNorm(epsilon=1e-6, **dtypes)
            self.to_out = nn.Dense(width, **dtypes)
            self.to_add_out = nn.Dense(width, **dtypes)

    def __call__(self, image: Array, context: FluxContext, text: Array | None = None) -> Any:
        """What every token gathers.

        Args:
            image: (B, T, D); without ``text`` all tokens.
            context: of the pass.
            text: (B, S, D), double only.

        Returns:
            (B, T, D); with ``text`` (B, T, D) and (B, S, D).
        """
        queries = self.norm_q(self._heads(self.to_q(image)))
        keys = self.norm_k(self._heads(self.to_k(image)))
        values = self._heads(self.to_v(image))
        if text is not None:
            own = self.norm_added_q(self._heads(self.add_q_proj(text)))
            queries = jnp.concatenate((own, queries), axis=1)
            own = self.norm_added_k(self._heads(self.add_k_proj(text)))
            keys = jnp.concatenate((own, keys), axis=1)
            values = jnp.concatenate((self._heads(self.add_v_proj(text)), values), axis=1)
        queries = apply_axis_rope(queries, context.cos, context.sin)
        keys = apply_axis_rope(keys, context.cos, context.sin)
        how = self.implementation
        mixed = attend(queries, keys, values, None, causal=False, implementation=how)
        if text is None:
            return mixed
        length = text.shape[1]
        return self.to_out(mixed[:, length:]), self.to_add_out(mixed[:, :length])

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)
