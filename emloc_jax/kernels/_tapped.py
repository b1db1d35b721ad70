"""A kernel that measures what flows through it: second moments as cotangents."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emloc_jax.errors import MaskShapeError
from emloc_jax.kernels._box import Box, peel
from emloc_jax.kernels._layout import Layout

__all__ = ["TappedKernel", "tap_gradient", "tap_input"]


@struct.dataclass
class TappedKernel(Box):
    """Stands for `kernel`, and turns the second moments of its traffic into cotangents.

    All fields between `kernel` and `mask` are phantoms: zeros that take part in nothing. Under
    `jax.grad` of a scalar of the model's output, however, their cotangents are exactly

        moment   -> sum x x^T        gradient          -> sum g g^T      count -> number of tokens
        through  -> sum y y^T        gradient_through  -> sum u u^T
        diagonal -> sum x_i^2        gradient_diagonal -> sum g_i^2

    over the tokens where `mask` is true, with `x` the kernel's input row and `g` the gradient of
    the scalar at its output row; `y = x K` (no bias) and `u = g K^T` are computed again in fp32,
    whatever the module computes in. Sums are in fp32, all products at the highest matmul precision.
    What is summed of inputs does not depend on the scalar, so XLA drops the rest of the backward
    pass when only that is asked for. A phantom left None is not measured. This works under scan,
    remat, jit and vmap, and for parameters that a scan broadcasts, where mutable collections do
    not.

    Attributes:
      kernel: the kernel, an array in the module's layout or another box.
      moment: fp32 `(*stack, d_in, d_in)` or None.
      count: fp32 `(*stack,)` or None.
      gradient: fp32 `(*stack, d_out, d_out)` or None.
      through: fp32 `(*stack, d_out, d_out)` or None.
      diagonal: fp32 `(*stack, d_in)` or None.
      gradient_through: fp32 `(*stack, d_in, d_in)` or None; measured with the next or not at all.
      gradient_diagonal: fp32 `(*stack, d_out)` or None.
      mask: bool `(*stack, *token axes)` or None for "every token counts".
      layout: axes of the kernel that the module expects (static).
    """

    kernel: Any
    moment: jax.Array | None = None
    count: jax.Array | None = None
    gradient: jax.Array | None = None
    through: jax.Array | None = None
    diagonal: jax.Array | None = None
    gradient_through: jax.Array | None = None
    gradient_diagonal: jax.Array | None = None
    mask: jax.Array | None = None
    layout: Layout = struct.field(pytree_node=False, default=Layout())

    def unbox(self) -> jax.Array:
        """The kernel itself; a tap that is unboxed measures nothing, so its count stays zero."""
        kernel = peel(self.kernel)
        return kernel.unbox() if isinstance(kernel, Box) else kernel


@jax.custom_vjp
def _with_cotangent(value: jax.Array, phantom: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Identity on `value`; the cotangent of `phantom` is `cotangent`."""
    return value


def _with_cotangent_fwd(value, phantom, cotangent):
    return value, cotangent


def _with_cotangent_bwd(cotangent, g):
    return g, cotangent, jnp.zeros_like(cotangent)


_with_cotangent.defvjp(_with_cotangent_fwd, _with_cotangent_bwd)


@jax.custom_vjp
def _with_gradient_moment(
    rows: jax.Array, phantom: jax.Array, weights: jax.Array | None
) -> jax.Array:
    """Identity on `rows (n, d)`; the cotangent of `phantom` is the sum of `g g^T` over rows."""
    return rows


def _with_gradient_moment_fwd(rows, phantom, weights):
    return rows, weights


def _with_gradient_moment_bwd(weights, g):
    return g, _gram(_counted(g, weights)), None if weights is None else jnp.zeros_like(weights)


_with_gradient_moment.defvjp(_with_gradient_moment_fwd, _with_gradient_moment_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_compact_gradient(
    layout: Layout,
    rows: jax.Array,
    phantoms: tuple[jax.Array, jax.Array],
    kernel: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    """Identity on `rows (n, d)`; the cotangents of `phantoms` are of `g K^T` and of squares."""
    return rows


def _with_compact_gradient_fwd(layout, rows, phantoms, kernel, weights):
    # The kernel as it is stored: a scan keeps no second copy of what it is given.
    return rows, (kernel, weights)


def _with_compact_gradient_bwd(layout, kept, g):
    kernel, weights = kept
    own = _counted(g, weights)
    back = _product(own, layout.matrix(kernel).mT)
    nothing = None if weights is None else jnp.zeros_like(weights)
    return g, (_gram(back), _squares(own)), jnp.zeros_like(kernel), nothing


_with_compact_gradient.defvjp(_with_compact_gradient_fwd, _with_compact_gradient_bwd)


def tap_input(y: jax.Array, rows: jax.Array, tap: TappedKernel, where: str) -> jax.Array:
    """Ties the input's second moment to `y`, the kernel's output.

    Args:
      y: the kernel's output; returned unchanged.
      rows: the kernel's input, `(*token axes, d_in)` in the kernel's order of inputs.
      tap: the box that asks.
      where: name of the module, for the error.

    Raises:
      MaskShapeError: the mask does not fit the token axes.
    """
    asked = (tap.moment, tap.count, tap.through, tap.diagonal)
    if all(phantom is None for phantom in asked):
        return y
    weights = _token_weights(tap.mask, rows.shape[:-1], where)
    rows = jax.lax.stop_gradient(rows.reshape(-1, rows.shape[-1]))
    own = _counted(rows, weights)
    if tap.moment is not None:
        y = _with_cotangent(y, tap.moment, _gram(own))
    if tap.through is not None:
        kernel = jax.lax.stop_gradient(tap.layout.matrix(tap.unbox()))
        y = _with_cotangent(y, tap.through, _gram(_product(own, kernel)))
    if tap.diagonal is not None:
        y = _with_cotangent(y, tap.diagonal, _squares(own))
    if tap.count is not None:
        total = jnp.float32(rows.shape[0]) if weights is None else weights.sum()
        y = _with_cotangent(y, tap.count, total)
    return y


def tap_gradient(rows: jax.Array, tap: TappedKernel, where: str) -> jax.Array:
    """Ties the second moment of the gradient at `rows (*token axes, d_out)` to the rows."""
    if tap.gradient is None and tap.gradient_through is None:
        return rows
    weights = _token_weights(tap.mask, rows.shape[:-1], where)
    flat: Any = rows.reshape(-1, rows.shape[-1])
    if tap.gradient is not None:
        flat = _with_gradient_moment(flat, tap.gradient, weights)
    if tap.gradient_through is not None:
        assert tap.gradient_diagonal is not None, "the two are measured together"
        phantoms = (tap.gradient_through, tap.gradient_diagonal)
        kernel = jax.lax.stop_gradient(tap.unbox())
        flat = _with_compact_gradient(tap.layout, flat, phantoms, kernel, weights)
    return flat.reshape(rows.shape)


def _counted(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Rows `(n, d)` in fp32, zero where their weight is; such rows may hold anything."""
    rows = rows.astype(jnp.float32)
    return rows if weights is None else jnp.where(weights[:, None] > 0, rows, 0.0)


def _product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.matmul(rows, matrix.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _squares(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows * rows, axis=0)


def _gram(rows: jax.Array) -> jax.Array:
    """`sum x x^T` over fp32 rows `(n, d)`."""
    return jnp.einsum(
        "ni,nj->ij",
        rows,
        rows,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _token_weights(mask: jax.Array | None, tokens: tuple[int, ...], where: str) -> jax.Array | None:
    """Flattens `mask` to one fp32 weight per row of an input with these token axes."""
    if mask is None:
        return None
    if mask.shape == tokens:
        return mask.reshape(-1).astype(jnp.float32)
    if mask.ndim < len(tokens) and tokens[: mask.ndim] == mask.shape:
        extra = len(tokens) - mask.ndim
        mask = jnp.broadcast_to(mask.reshape(*mask.shape, *(1,) * extra), tokens)
        return mask.reshape(-1).astype(jnp.float32)
    raise MaskShapeError(
        f"The mask has shape {mask.shape} but {where} reads an input with token axes {tokens}. "
        "The mask must have those axes or a leading part of them (axes that were flattened or "
        "reordered cannot be told apart). Leave this kernel out, or calibrate it without a mask."
    )
