"""One small residual block per handler, with the same block written out by hand.

Every block computes `y = x + tanh(v)` with `v = kernel use of x`, reshaped to the shape of `x`.
By hand, `rows(x)` are the kernel's input rows and `matrix(kernel)` its matrix, so `v = rows @
matrix + bias`; that is all a test needs to compute moments and gradients without the library.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

B, T, D = 2, 5, 4


class DenseBlock(nn.Module):
    dtype: jnp.dtype | None = None
    param = "linear/kernel"

    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(D, name="linear", dtype=self.dtype)(x)), None


class DenseGeneralOutBlock(nn.Module):
    dtype: jnp.dtype | None = None
    param = "linear/kernel"

    @nn.compact
    def __call__(self, x, _=None):
        v = nn.DenseGeneral((2, D // 2), name="linear", dtype=self.dtype)(x)
        return x + jnp.tanh(v.reshape(x.shape)), None


class DenseGeneralInBlock(nn.Module):
    dtype: jnp.dtype | None = None
    param = "linear/kernel"

    @nn.compact
    def __call__(self, x, _=None):
        heads = x.reshape(*x.shape[:-1], 2, D // 2)
        v = nn.DenseGeneral(D, axis=(-2, -1), name="linear", dtype=self.dtype)(heads)
        return x + jnp.tanh(v), None


class EinsumOutBlock(nn.Module):
    dtype: jnp.dtype | None = None
    param = "linear/kernel"

    @nn.compact
    def __call__(self, x, _=None):
        linear = nn.Einsum((D, 2, D // 2), "BTD,DNH->BNTH", name="linear", dtype=self.dtype)
        v = linear(inputs=x)  # by keyword, and with the output axes apart
        return x + jnp.tanh(v.swapaxes(1, 2).reshape(x.shape)), None


class EinsumTransposedBlock(nn.Module):
    dtype: jnp.dtype | None = None
    param = "linear/kernel"

    @nn.compact
    def __call__(self, x, _=None):
        linear = nn.Einsum((D, 2, D // 2), "...NH,DNH->...D", name="linear", dtype=self.dtype)
        return x + jnp.tanh(linear(x.reshape(*x.shape[:-1], 2, D // 2))), None


class ConvBlock(nn.Module):
    dtype: jnp.dtype | None = None
    param = "linear/kernel"

    @nn.compact
    def __call__(self, x, _=None):
        conv = nn.Conv(
            D, (3,), kernel_dilation=2, padding="CAUSAL", name="linear", dtype=self.dtype
        )
        return x + jnp.tanh(conv(x)), None


class AttendBlock(nn.Module):
    dtype: jnp.dtype | None = None
    param = "linear/embedding"

    @nn.compact
    def __call__(self, x, _=None):
        embed = nn.Embed(D, D, name="linear", dtype=self.dtype)
        looked_up = embed(jnp.arange(T) % D)  # tied: the table is also looked up
        return x + jnp.tanh(embed.attend(x)) + 0.1 * looked_up, None


BLOCKS = [
    DenseBlock,
    DenseGeneralOutBlock,
    DenseGeneralInBlock,
    EinsumOutBlock,
    EinsumTransposedBlock,
    ConvBlock,
    AttendBlock,
]


def rows(block, x):
    """Input rows (B, T, d_in) of the block's kernel, written out by hand."""
    if block is not ConvBlock:
        return x
    padded = jnp.concatenate([jnp.zeros((*x.shape[:-2], 4, D), x.dtype), x], axis=-2)
    taps = [padded[..., offset : offset + T, :] for offset in (0, 2, 4)]
    return jnp.concatenate(taps, axis=-1)


def matrix(block, kernel):
    """The kernel (d_in, d_out) of `v = rows @ matrix`, written out by hand."""
    if block is AttendBlock:
        return kernel.T
    if block is EinsumTransposedBlock:
        return kernel.reshape(D, D).T
    return kernel.reshape(-1, D)


def by_hand(block, params, x, delta):
    """The block's output, with `delta (B, T, D)` added to the kernel's output."""
    kernel = params["linear"]["embedding" if block is AttendBlock else "kernel"]
    bias = params["linear"].get("bias", jnp.zeros(D)).reshape(D)
    y = x + jnp.tanh(rows(block, x) @ matrix(block, kernel) + bias + delta)
    return y + 0.1 * kernel[np.arange(T) % D] if block is AttendBlock else y
