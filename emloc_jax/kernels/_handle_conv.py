"""`nn.Conv` without groups: a low-rank convolution is a thin one followed by a 1x1."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from emloc_jax.kernels._handle_dense import contract, first_argument
from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._product import KernelUse

__all__ = ["use_conv"]


def use_conv(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelUse | str:
    """Handler of `nn.Conv`: the kernel's input is the patch `(*window, channels)`."""
    m: Any = module
    if m.feature_group_count != 1:
        return "the convolution has `feature_group_count > 1`."
    if m.mask is not None:
        return "the convolution masks its kernel."
    if m.conv_general_dilated is not None or m.conv_general_dilated_cls is not None:
        return "the module computes with a `conv_general_dilated` of its own."
    x = first_argument(args, kwargs, "inputs")
    window = (m.kernel_size,) if isinstance(m.kernel_size, int) else tuple(m.kernel_size)

    def full(x, kernel):
        # The module's own code with another kernel: padding, strides and dilation stay its own.
        thin = m.clone(features=kernel.shape[-1], use_bias=False, parent=None, name=None)
        return thin.apply({"params": {"kernel": kernel}}, x)

    def low_rank(x, left, right):
        x, left, right = m.promote_dtype(x, left, right, dtype=m.dtype)
        narrow = full(x, left)
        return contract(narrow, (narrow.ndim - 1,), right, m.precision)

    def finish(y):
        if not m.use_bias:
            return y
        bias = meta.unbox(m.get_variable("params", "bias"))
        y, bias = m.promote_dtype(y, bias, dtype=m.dtype)
        return y + bias

    def rows(x):
        # Convolving with an identity kernel lays the patches out in the kernel's own order.
        size = math.prod(window) * x.shape[-1]
        return full(x, jnp.eye(size, dtype=x.dtype).reshape(*window, x.shape[-1], size))

    return KernelUse(
        module=module,
        param="kernel",
        inputs=x,
        layout=Layout(num_in=len(window) + 1, num_out=1),
        full=full,
        low_rank=low_rank,
        finish=finish,
        rows=rows,
        out_rows=lambda y: (y, lambda rows: rows),
    )
