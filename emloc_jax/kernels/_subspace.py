"""A kernel whose gradient is compressed before it exists: the cotangent of a zero core."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emloc_jax.errors import ProjectorError
from emloc_jax.kernels._box import Box, peel
from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._projector import SparseProjector
from emloc_jax.kernels._projector_products import lift_matrix, project

__all__ = ["SubspaceKernel", "apply_frozen", "tie_core"]


@struct.dataclass
class SubspaceKernel(Box):
    """Stands for `kernel = base + P core Q^T` with a core that is, and stays, zero.

    The gradient at the core is then `P^T G Q`, with `G (d_in, d_out)` the gradient at the kernel
    (LSP-Offload, arXiv 2406.10181). Under `intercept` it is computed as `(x P)^T (dY Q)`: the core
    takes part in no product, `x P` is kept for the backward pass instead of `x`, and neither `G`
    nor any array of its size exists. `base`, `p` and `q` get no gradient; differentiate with
    respect to the core alone.

    Attributes:
      base: the kernel, an array in the module's layout or another box.
      p: `(*stack, d_in, s_in)`, or None: inputs are not compressed and `s_in` is `d_in`.
      core: fp32 zeros `(*stack, s_in, s_out)`.
      q: `(*stack, d_out, s_out)`, or None: outputs are not compressed and `s_out` is `d_out`.
      layout: axes of the kernel that the module expects (static).

    Example:
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import intercept, make_projector
      >>> p, q = make_projector(0, 6, size=3, nnz=2), make_projector(1, 4, size=2, nnz=1)
      >>> def loss(core):
      ...   box = SubspaceKernel(jnp.ones((6, 4)), p, core, q)
      ...   y = intercept(nn.Dense(4, use_bias=False).apply)({"params": {"kernel": box}}, x)
      ...   return jnp.sum(y**2)
      >>> x = jnp.arange(12.0).reshape(2, 6)
      >>> jax.grad(loss)(jnp.zeros((3, 2))).shape
      (3, 2)
    """

    base: Any
    p: SparseProjector | None
    core: jax.Array
    q: SparseProjector | None
    layout: Layout = struct.field(pytree_node=False, default=Layout())

    def unbox(self) -> jax.Array:
        """The kernel, in the base's dtype and layout; gradients reach the core, at full cost."""
        base = peel(jax.lax.stop_gradient(self.base))
        base = base.unbox() if isinstance(base, Box) else base
        shape = base.shape
        delta = lift_matrix(self.core, *jax.lax.stop_gradient((self.p, self.q)))
        delta = self.layout.from_matrix(
            delta, self.layout.in_shape(shape), self.layout.out_shape(shape)
        )
        return (base.astype(jnp.float32) + delta).astype(base.dtype)


def apply_frozen(function: Callable[..., jax.Array], x: jax.Array, kernel: Any) -> jax.Array:
    """`function(x, kernel)`, linear in `x`, with a kernel that gets no gradient.

    Not `stop_gradient`: for JAX that is a new array, of which a scan would keep one for each layer
    until the backward pass, a copy of the model.
    """
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def backward(kernel: Any, g: jax.Array) -> Any:
        return *jax.linear_transpose(lambda x: function(x, kernel), like)(g), None

    apply = jax.custom_vjp(function)
    apply.defvjp(lambda x, kernel: (function(x, kernel), kernel), backward)
    return apply(x, kernel)


def tie_core(rows: jax.Array, inputs: jax.Array, kernel: SubspaceKernel, where: str) -> jax.Array:
    """Ties the compressed gradient of `kernel` to the core's cotangent.

    Args:
      rows: the kernel's output `(*token axes, d_out)`; returned unchanged.
      inputs: the kernel's input `(*token axes, d_in)`, in the kernel's order of inputs.
      kernel: the box that asks.
      where: name of the module, for the error.

    Raises:
      ProjectorError: projectors, core and kernel do not fit together.
    """
    flat, x = rows.reshape(-1, rows.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    _check(kernel, x.shape[-1], flat.shape[-1], where)
    # Modules cast their input to the dtype they compute in; what is kept need not be wider.
    dtype = min(x.dtype, flat.dtype, key=lambda dtype: dtype.itemsize)
    z = project(jax.lax.stop_gradient(x).astype(dtype), jax.lax.stop_gradient(kernel.p)).astype(
        dtype
    )
    return _with_compressed_gradient(flat, kernel.core, z, kernel.q).reshape(rows.shape)


@jax.custom_vjp
def _with_compressed_gradient(
    rows: jax.Array, core: jax.Array, z: jax.Array, q: SparseProjector | None
) -> jax.Array:
    """Identity on `rows (n, d_out)`; the cotangent of `core` is `z^T (gradient at rows) Q`."""
    return rows


def _with_compressed_gradient_fwd(rows, core, z, q):
    return rows, (z, q)


def _with_compressed_gradient_bwd(residuals, g):
    z, q = residuals
    # The barrier keeps XLA from folding a projector's gathers into the layout of the dot: the dot
    # is then the same whatever the projectors, and a permutation gives the bits of no projector.
    z, w = jax.lax.optimization_barrier((z, project(g, q).astype(g.dtype)))
    # Operands in the dtype of the computation (bf16 keeps its fast path), the sum in fp32.
    gradient = jnp.einsum(
        "ni,nj->ij",
        z,
        w,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return g, gradient, None, None


_with_compressed_gradient.defvjp(_with_compressed_gradient_fwd, _with_compressed_gradient_bwd)


def _check(kernel: SubspaceKernel, d_in: int, d_out: int, where: str) -> None:
    """Refuses projectors or a core that do not fit a `(d_in, d_out)` kernel."""
    sizes = []
    for name, projector, d in (("p", kernel.p, d_in), ("q", kernel.q, d_out)):
        if projector is not None and (projector.stack_shape or projector.d != d):
            raise ProjectorError(
                f"{where} has a kernel of matrix shape {(d_in, d_out)}, but `{name}` of its "
                f"subspace projects {projector.stack_shape + (projector.d,)} rows. Make the "
                "projector for this kernel; layers that a scan stacks need stacked projectors."
            )
        sizes.append(d if projector is None else projector.size)
    if kernel.core.shape != tuple(sizes) or kernel.core.dtype != jnp.float32:
        raise ProjectorError(
            f"The core of {where} is {kernel.core.dtype} {kernel.core.shape}; with its projectors "
            f"it must be float32 zeros of shape {tuple(sizes)}."
        )
