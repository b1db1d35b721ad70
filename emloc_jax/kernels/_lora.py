"""A kernel with a low-rank adapter beside it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from emloc_jax.errors import UnsupportedKernelError
from emloc_jax.kernels._box import Box, peel
from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._low_rank import factor_product

__all__ = ["LoraKernel", "lora_scale"]


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Scale of the adapter branch: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.

    Example:
      >>> lora_scale(16, 8, rslora=False), lora_scale(16, 4, rslora=True)
      (2.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if rslora else rank)


@struct.dataclass
class LoraKernel(Box):
    """Stands for `kernel = base + scale * lora_a @ lora_b` (LoRA, arXiv 2106.09685).

    `alpha` lives in the box, so the scale cannot be lost between training, correction and merge.

    Attributes:
      base: the frozen kernel, an array in the module's layout or another box.
      lora_a: `(*stack, *in, rank)`.
      lora_b: `(*stack, rank, *out)`.
      dropout_key: typed PRNG key(s) of shape `(*stack,)` for dropout on the branch's input, or
        None when nothing is dropped.
      alpha: numerator of the scale (static).
      rslora: divide by `sqrt(rank)` instead of `rank` (static).
      dropout: dropout rate, used only with `dropout_key` (static).
      layout: axes of the kernel that the module expects (static).

    Example:
      >>> import jax.numpy as jnp
      >>> box = LoraKernel(jnp.eye(2), jnp.ones((2, 1)), jnp.ones((1, 2)), alpha=3.0)
      >>> box.unbox()
      Array([[4., 3.],
             [3., 4.]], dtype=float32)
    """

    base: Any
    lora_a: jax.Array
    lora_b: jax.Array
    dropout_key: jax.Array | None = None
    alpha: float = struct.field(pytree_node=False, default=1.0)
    rslora: bool = struct.field(pytree_node=False, default=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    layout: Layout = struct.field(pytree_node=False, default=Layout())

    @property
    def rank(self) -> int:
        """Number of columns of `lora_a`."""
        return meta.unbox(self.lora_a).shape[-1]

    @property
    def scale(self) -> float:
        """`alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
        return lora_scale(self.alpha, self.rank, self.rslora)

    def unbox(self) -> jax.Array:
        """The kernel with the adapter added in fp32, in the base's dtype and layout.

        Raises:
          UnsupportedKernelError: the box asks for dropout, which acts on an input and hence needs
            the intercepted path.
        """
        if self.dropout_key is not None and self.dropout > 0:
            raise UnsupportedKernelError(
                f"A LoRA kernel with dropout {self.dropout} was read as an array, which would "
                "silently drop nothing. Wrap the model's apply in `intercept`, or attach the "
                "adapters without a key."
            )
        base = peel(self.base)
        base = base.unbox() if isinstance(base, Box) else base
        a, b = meta.unbox((self.lora_a, self.lora_b))
        delta = factor_product(a.astype(jnp.float32), b.astype(jnp.float32), self.layout)
        delta = self.layout.from_canonical(self.scale * delta)
        return (base.astype(jnp.float32) + delta).astype(base.dtype)
