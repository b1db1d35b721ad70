"""What a module does with its kernel, and how that is computed for each kind of box."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from emloc_jax.errors import UnsupportedKernelError
from emloc_jax.kernels._box import peel
from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._lora import LoraKernel
from emloc_jax.kernels._low_rank import LowRankKernel
from emloc_jax.kernels._subspace import SubspaceKernel, apply_frozen, tie_core
from emloc_jax.kernels._tapped import TappedKernel, tap_gradient, tap_input

__all__ = ["KernelUse", "apply_kernel"]

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """One call of a linen module, seen as a linear map that its kernel parametrises.

    A handler makes one per intercepted call; everything below is for that call's shapes.

    Attributes:
      module: the bound module.
      param: name of the kernel among the module's parameters.
      inputs: what the kernel is multiplied with.
      layout: axes of the kernel.
      full: `(inputs, kernel) -> y` without bias, for an array in the module's layout.
      low_rank: `(inputs, left, right) -> y` without bias, never forming the product.
      finish: `y -> y` adds the bias, once.
      rows: `inputs -> (*token axes, d_in)` in canonical order; None when the kernel is used as a
        lookup table, which has no input vectors.
      out_rows: `y -> ((*token axes, d_out), inverse)`.
      input_key: hashable; kernels that read the same array with the same key see equal rows. None
        when that can never be said.
    """

    module: nn.Module
    param: str
    inputs: jax.Array
    layout: Layout
    full: Function
    low_rank: Function
    finish: Function
    rows: Function | None
    out_rows: Function | None
    input_key: Any = None

    def name(self) -> str:
        """Name of the module for messages."""
        return f"{type(self.module).__name__} '{'/'.join(self.module.path)}'"


def apply_kernel(use: KernelUse, kernel: Any) -> jax.Array:
    """The module's output for a boxed `kernel`, bias included."""
    return use.finish(_linear(use, use.inputs, kernel))


def _linear(use: KernelUse, inputs: jax.Array, kernel: Any) -> jax.Array:
    kernel = peel(kernel)
    match kernel:
        case LowRankKernel():
            left, right = meta.unbox((kernel.left, kernel.right))
            return use.low_rank(inputs, left, right)
        case LoraKernel():
            y = _linear(use, inputs, kernel.base)
            a, b = meta.unbox((kernel.lora_a, kernel.lora_b))
            # The scale goes to the smaller operand, never to the tokens' activations.
            delta = use.low_rank(_dropped(use, inputs, kernel), a, kernel.scale * b)
            return y + delta.astype(y.dtype)
        case TappedKernel():
            y = _linear(use, inputs, kernel.kernel)
            if use.rows is None or use.out_rows is None:
                return y  # A lookup has no input vectors; the same table used as a head is tapped.
            y = tap_input(y, use.rows(inputs), kernel, use.name())
            rows, restore = use.out_rows(y)
            return restore(tap_gradient(rows, kernel, use.name()))
        case SubspaceKernel():
            if use.rows is None or use.out_rows is None:
                raise UnsupportedKernelError(
                    f"{use.name()} looks rows up in a table that is trained in a subspace. What "
                    "the lookup adds to the table's gradient has no compressed form and would be "
                    "lost. Leave this kernel out of the subspace kernels (freeze it, or train it "
                    "densely), or untie it."
                )
            y = apply_frozen(functools.partial(_linear, use), inputs, kernel.base)
            rows, restore = use.out_rows(y)
            return restore(tie_core(rows, use.rows(inputs), kernel, use.name()))
        case _:
            return use.full(inputs, kernel)


def _dropped(use: KernelUse, inputs: jax.Array, kernel: LoraKernel) -> jax.Array:
    """Inverted dropout on the input of the adapter branch, as in LoRA's reference."""
    if kernel.dropout_key is None or kernel.dropout == 0 or use.rows is None:
        return inputs
    keep = jax.random.bernoulli(kernel.dropout_key, 1 - kernel.dropout, inputs.shape)
    return jnp.where(keep, inputs / (1 - kernel.dropout), 0).astype(inputs.dtype)
