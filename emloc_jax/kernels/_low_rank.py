"""The kernel of an emulator: a product of two thin factors."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from emloc_jax.kernels._box import Box
from emloc_jax.kernels._layout import Layout

__all__ = ["LowRankKernel", "factor_product"]


@struct.dataclass
class LowRankKernel(Box):
    """Stands for `kernel = left @ right`.

    Attributes:
      left: `(*stack, *in, rank)`.
      right: `(*stack, rank, *out)`.
      layout: axes of the kernel that the module expects (static).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> box = LowRankKernel(left=jnp.ones((3, 1)), right=jnp.ones((1, 2)))
      >>> nn.Dense(2, use_bias=False).apply({"params": {"kernel": box}}, jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """

    left: jax.Array
    right: jax.Array
    layout: Layout = struct.field(pytree_node=False, default=Layout())

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return meta.unbox(self.left).shape[-1]

    def unbox(self) -> jax.Array:
        """The kernel `left @ right` in the layout of its module."""
        left, right = meta.unbox((self.left, self.right))
        return self.layout.from_canonical(factor_product(left, right, self.layout))


def factor_product(left: jax.Array, right: jax.Array, layout: Layout) -> jax.Array:
    """`left @ right` in canonical form.

    Args:
      left: `(*stack, *in, rank)`.
      right: `(*stack, rank, *out)`.
      layout: gives the number of input and output axes.

    Returns:
      `(*stack, *in, *out)`, with the factors' promoted dtype.
    """
    stack = left.shape[: left.ndim - layout.num_in - 1]
    in_shape, out_shape = left.shape[len(stack) : -1], right.shape[len(stack) + 1 :]
    rank = left.shape[-1]
    product = jnp.matmul(
        left.reshape(*stack, math.prod(in_shape), rank),
        right.reshape(*stack, rank, math.prod(out_shape)),
        precision=jax.lax.Precision.HIGHEST,
    )
    return product.reshape(*stack, *in_shape, *out_shape)
