"""The update of a kernel by a step in its subspace, in place."""

import math
from typing import Any

import jax

from emloc_jax.errors import ProjectorError
from emloc_jax.kernels import Layout, SparseProjector, lift, lift_rows, uncache
from emloc_jax.offload._rounding import (
    Rounding,
    check_rounding,
    exact_kernel,
    rounded_kernel,
    rounding_state,
)

__all__ = ["Rounding", "apply_update", "rounding_state"]

_IN_ORDER = Layout()
# Up to this many non-zeros per row gathers are used even if a dense copy is cached: unlike the
# gradient's, this product has no tokens that would share the cost of a dense one.
_SPARSE_NNZ = 16
# Numbers of a kernel updated at a time; bounds temporary memory to a few arrays of this size.
_BLOCK = 2**22


def apply_update(
    kernel: jax.Array,
    delta: jax.Array,
    p: SparseProjector | None,
    q: SparseProjector | None,
    *,
    decay: float | jax.Array = 0.0,
    layout: Layout = _IN_ORDER,
    rounding: Rounding = "nearest",
    extra: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`(1 - decay) K + P Delta Q^T` in fp32, rounded to the kernel's dtype.

    Pure; jit it with `kernel` and `extra` donated, and it works in place, by blocks of rows: beside
    the kernel there is only `Delta Q^T` and a block. (A kernel stored with input and output axes
    interleaved is copied, and on CPU one in bf16.)

    Rounded to nearest, a bf16 kernel loses every step below half its last bit, which is 2e-4 next
    to 0.1. The other roundings keep them:

      'nearest'     no extra memory; small steps are lost.
      'stochastic'  no extra memory; up or down at random, right in expectation.
      'kahan'       `extra` holds what rounding took away, and returns it with the next step.
      'master'      `extra` is the kernel in fp32; the kernel is its rounded copy.

    A fp32 kernel is not rounded by 'nearest' and 'stochastic'.

    Args:
      kernel: `(*stack, ...)` in the layout of its module.
      delta: `(*stack, s_in, s_out)`, the step, learning rate and sign included.
      p: `(*stack, d_in, s_in)`, or None for an uncompressed side.
      q: `(*stack, d_out, s_out)`, or None for an uncompressed side.
      decay: decoupled weight decay times learning rate; applied outside of the subspace.
      layout: axes of the kernel.
      rounding: see above.
      extra: of `rounding_state`, for 'kahan' and 'master'.
      key: PRNG key, for 'stochastic'.

    Returns:
      The new kernel and the new `extra` (None when there was none).

    Raises:
      ProjectorError: the step, the projectors and the kernel do not fit together.
      ConfigError: an unknown rounding, or one without what it needs.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.kernels import identity_projector
      >>> p = identity_projector(2, [1, 0])
      >>> kernel, _ = apply_update(jnp.ones((2, 2)), jnp.array([[1.0, 2], [3, 4]]), p, p, decay=0.5)
      >>> kernel
      Array([[4.5, 3.5],
             [2.5, 1.5]], dtype=float32)
    """
    check_rounding(kernel, rounding, extra, key)
    stack = layout.stack_shape(kernel.shape)
    in_shape, out_shape = layout.in_shape(kernel.shape), layout.out_shape(kernel.shape)
    d_in, d_out = math.prod(in_shape), math.prod(out_shape)
    _check_shapes(stack, (d_in, d_out), delta, p, q)
    p, q = _sparse(p), _sparse(q)

    # Rows of the stored matrix are either side's, so that a transposed kernel is not copied either.
    outputs_first = layout.perm == tuple(
        (layout.num_out + i) % layout.num_axes for i in range(layout.num_axes)
    )
    if outputs_first:
        p, q, delta = q, p, delta.swapaxes(-1, -2)
    flat = (math.prod(stack), d_out, d_in) if outputs_first else (math.prod(stack), d_in, d_out)

    def stored(array: jax.Array) -> jax.Array:
        return (array if outputs_first else layout.canonical(array)).reshape(flat)

    def restored(array: jax.Array) -> jax.Array:
        if outputs_first:
            return array.reshape(kernel.shape)
        return layout.from_canonical(array.reshape(*stack, *in_shape, *out_shape))

    def one(i: Any, state: Any) -> Any:
        step = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(stack) :])[i], (delta, p, q))
        own = jax.tree.map(lambda a: a[i], state)
        folded = None if key is None else jax.random.fold_in(key, i)
        new = _update_matrix(own, step, decay, rounding, folded)
        return jax.tree.map(lambda a, b: a.at[i].set(b), state, new)

    state = jax.tree.map(stored, (kernel, extra))
    return jax.tree.map(restored, jax.lax.fori_loop(0, flat[0], one, state))


def _update_matrix(
    state: tuple[jax.Array, jax.Array | None],
    step: tuple[jax.Array, SparseProjector | None, SparseProjector | None],
    decay: float | jax.Array,
    rounding: Rounding,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """One matrix `(rows, columns)` and its `extra`, block by block of rows."""
    delta, p, q = step
    rows, columns = state[0].shape
    half = lift(delta, q)  # Delta Q^T, (s_in, columns)

    def block(start: Any, count: int, state: Any) -> Any:
        kernel, extra = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, count), state)
        exact = (1 - decay) * exact_kernel(kernel, extra, rounding)
        # The sum is what the loop over non-zeros carries, so nothing below reads the old kernel,
        # and XLA need not keep a copy of it.
        exact = lift_rows(half, p, start, exact)
        folded = None if key is None else jax.random.fold_in(key, start)
        kind = None if extra is None else extra.dtype
        new = rounded_kernel(exact, kernel.dtype, kind, rounding, folded)
        return jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), state, new
        )

    # Without a loop over non-zeros all of it is one elementwise pass.
    alone = p is None or (p.nnz == 1 and p.cached is None)
    count = rows if alone else max(1, min(rows, _BLOCK // columns))
    state = jax.lax.fori_loop(0, rows // count, lambda i, s: block(i * count, count, s), state)
    return block(rows - rows % count, rows % count, state) if rows % count else state


def _sparse(p: SparseProjector | None) -> SparseProjector | None:
    return uncache(p) if p is not None and p.nnz <= _SPARSE_NNZ else p


def _check_shapes(
    stack: tuple[int, ...], matrix: tuple[int, int], delta: jax.Array, p: Any, q: Any
) -> None:
    for name, projector, length in (("p", p, matrix[0]), ("q", q, matrix[1])):
        if projector is not None and (projector.stack_shape, projector.d) != (stack, length):
            raise ProjectorError(
                f"`{name}` projects {projector.stack_shape + (projector.d,)} rows, but the matrix "
                f"of the kernel is {stack + matrix}; each of stacked kernels needs its projector."
            )
    sizes = tuple(
        length if projector is None else projector.size
        for projector, length in zip((p, q), matrix, strict=True)
    )
    if delta.shape != stack + sizes:
        raise ProjectorError(
            f"The step has shape {delta.shape}; these projectors and this kernel need "
            f"{stack + sizes}."
        )
