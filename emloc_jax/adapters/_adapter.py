"""The adapter of one kernel: two factors and everything that fixes their scale."""

from __future__ import annotations

import math

import jax
from flax import struct

from emloc_jax.kernels import Layout, lora_scale

__all__ = ["Adapter"]


@struct.dataclass
class Adapter:
    """Adds `scale * lora_a @ lora_b` to one kernel (LoRA, arXiv 2106.09685).

    Leading axes (`*stack`) are scan or vmap axes: one pair of factors per layer. The factors
    keep the kernel's own input and output axes, so shardings carry over. `alpha`, `rslora`,
    `layout` and `corrected` are static: they travel with the factors through `jit`, `grad` and
    checkpoints, so that a scale can never be lost between training, correction and merge.

    Attributes:
      lora_a: (*stack, *in, rank), float32.
      lora_b: (*stack, rank, *out), float32.
      alpha: numerator of the scale.
      rslora: whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
      layout: how the kernel's array maps to (*stack, *in, *out).
      corrected: whether the emulator's error was subtracted already (see `correct`).

    Example:
      >>> import jax.numpy as jnp
      >>> adapter = Adapter(jnp.zeros((3, 8, 4)), jnp.zeros((3, 4, 6)), alpha=8.0)
      >>> adapter.rank, adapter.scale, adapter.stack_shape, adapter.kernel_shape
      (4, 2.0, (3,), (3, 8, 6))
    """

    lora_a: jax.Array
    lora_b: jax.Array
    alpha: float = struct.field(pytree_node=False)
    rslora: bool = struct.field(pytree_node=False, default=False)
    layout: Layout = struct.field(pytree_node=False, default=Layout())
    corrected: bool = struct.field(pytree_node=False, default=False)

    @property
    def rank(self) -> int:
        """Number of columns of `lora_a`."""
        return self.lora_a.shape[-1]

    @property
    def scale(self) -> float:
        """The factor of the product in the forward pass: alpha/rank, or alpha/sqrt(rank)."""
        return lora_scale(self.alpha, self.rank, self.rslora)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading axes that both factors share with the kernel."""
        return tuple(self.lora_a.shape[: self.lora_a.ndim - self.layout.num_in - 1])

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Input axes of the kernel."""
        return tuple(self.lora_a.shape[len(self.stack_shape) : -1])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Output axes of the kernel."""
        return tuple(self.lora_b.shape[len(self.stack_shape) + 1 :])

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the array that the adapter fits, in the kernel's own layout."""
        trailing = self.in_shape + self.out_shape
        if self.layout.perm is None:
            return self.stack_shape + trailing
        array = [0] * len(trailing)
        for axis, source in enumerate(self.layout.perm):
            array[source] = trailing[axis]
        return self.stack_shape + tuple(array)

    def matrices(self) -> tuple[jax.Array, jax.Array]:
        """The factors with flattened axes: (*stack, d_in, rank) and (*stack, rank, d_out)."""
        stack = self.stack_shape
        lora_a = self.lora_a.reshape(*stack, math.prod(self.in_shape), self.rank)
        lora_b = self.lora_b.reshape(*stack, self.rank, math.prod(self.out_shape))
        return lora_a, lora_b

    def with_matrices(self, lora_a: jax.Array, lora_b: jax.Array, **changes) -> Adapter:
        """The same adapter with new factors, given as matrices.

        Args:
          lora_a: (*stack, d_in, rank).
          lora_b: (*stack, rank, d_out).
          **changes: other fields to replace, for instance `corrected=True`.
        """
        stack, rank = self.stack_shape, lora_a.shape[-1]
        return self.replace(  # type: ignore[attr-defined]
            lora_a=lora_a.reshape(*stack, *self.in_shape, rank),
            lora_b=lora_b.reshape(*stack, rank, *self.out_shape),
            **changes,
        )
