"""Products with sparse projectors: gathers of a fixed size, or dense when a copy is cached.

Sums are in fp32 at the highest matmul precision, and so is every result. None stands for the
identity wherever a projector is expected. A projector with stack axes multiplies arrays that carry
the same leading axes. Products are linear in `x`, and only that way differentiable.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.kernels._projector import SparseProjector, to_dense

__all__ = ["cross", "gram", "lift", "lift_matrix", "lift_rows", "project", "project_matrix"]

# Gathers that one trip of the loop over non-zeros adds up in one pass over the result.
_FUSED = 4


def project(x: jax.Array, p: SparseProjector | None) -> jax.Array:
    """`x P`.

    A cached copy is rounded to the dtype of `x` if that is narrower.

    Args:
      x: `(*stack, ..., d)`.
      p: `(d, size)`, or None.

    Returns:
      fp32 `(*stack, ..., size)`.

    Example:
      >>> from emloc_jax.kernels import identity_projector
      >>> project(jnp.array([1.0, 2.0, 3.0]), identity_projector(3, [2, 0, 1]))
      Array([2., 3., 1.], dtype=float32)
    """
    return _over_stacks(functools.partial(_project, axis=-1), x, p)


def lift(z: jax.Array, p: SparseProjector | None) -> jax.Array:
    """`z P^T`.

    Args:
      z: `(*stack, ..., size)`.
      p: `(d, size)`, or None.

    Returns:
      fp32 `(*stack, ..., d)`.
    """
    return _over_stacks(functools.partial(_lift, axis=-1), z, p)


def project_matrix(g: jax.Array, p: SparseProjector | None, q: SparseProjector | None) -> jax.Array:
    """`P^T G Q`: fp32 `(*stack, s_in, s_out)` from `g (*stack, d_in, d_out)`."""
    return _over_stacks(functools.partial(_both_sides, _project), g, p, q)


def lift_matrix(
    delta: jax.Array, p: SparseProjector | None, q: SparseProjector | None
) -> jax.Array:
    """`P Delta Q^T`: fp32 `(*stack, d_in, d_out)` from `delta (*stack, s_in, s_out)`."""
    return _over_stacks(functools.partial(_both_sides, _lift), delta, p, q)


def lift_rows(
    z: jax.Array, p: SparseProjector | None, start: int | jax.Array, plus: jax.Array
) -> jax.Array:
    """`plus` and rows of `P z`: fp32 `(count, n)` from `z (size, n)` and fp32 `plus (count, n)`.

    The rows are those from `start` on. For large arrays that are updated piece by piece; no stacks.
    """

    def cut(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, start, plus.shape[0])

    if p is None:
        return plus + cut(z).astype(jnp.float32)
    if p.cached is not None:
        return plus + _dense_product(z, cut(p.cached).T, -2)
    index, weights = cut(p.indices).astype(jnp.int32), cut(p.values).astype(jnp.float32)
    return _gathered(z, index, weights, -2, plus)


def gram(p: SparseProjector | None) -> jax.Array | None:
    """`P^T P`: fp32 `(*stack, size, size)`; None (the identity) for None."""
    return cross(p, p)


def cross(new: SparseProjector | None, old: SparseProjector | None) -> jax.Array | None:
    """`new^T old`: fp32 `(*stack, new size, old size)`; None (the identity) when both are None."""
    if old is None:
        return None if new is None else to_dense(new).astype(jnp.float32).swapaxes(-1, -2)
    dense = to_dense(old).astype(jnp.float32)
    return _over_stacks(functools.partial(_project, axis=-2), dense, new)


def _over_stacks(function: Callable[..., Any], x: jax.Array, *projectors: Any) -> jax.Array:
    """Maps `function` over the projectors' stack axes, which lead `x` too."""
    if not any(p is not None and p.stack_shape for p in projectors):
        return function(x, *projectors)
    return jax.vmap(functools.partial(_over_stacks, function))(x, *projectors)


def _both_sides(one: Callable[..., Any], g: Any, p: Any, q: Any) -> jax.Array:
    """Applies `one` on both axes, in the order with the smaller array in between."""
    rows, columns = g.shape[-2:]
    if _length(one, p, rows) * columns < rows * _length(one, q, columns):
        return one(one(g, p, axis=-2), q, axis=-1)
    return one(one(g, q, axis=-1), p, axis=-2)


def _length(one: Callable[..., Any], p: SparseProjector | None, length: int) -> int:
    """Length of an axis after `one`."""
    if p is None:
        return length
    return p.size if one is _project else p.d


def _project(x: jax.Array, p: SparseProjector | None, *, axis: int) -> jax.Array:
    """Maps an axis of length `d` to `size`."""
    if p is None:
        return x.astype(jnp.float32)
    if p.cached is not None:
        # Both operands as narrow as the rows: products of bf16 with fp32 miss the matrix units.
        narrow = axis == -1 and x.dtype.itemsize < p.cached.dtype.itemsize
        return _dense_product(x, p.cached.astype(x.dtype) if narrow else p.cached, axis)
    slots = p.slots.astype(jnp.int32)
    flat = p.values.reshape(-1).astype(jnp.float32)
    # Padding reads the last row with weight zero.
    weights = jnp.where(slots < flat.size, flat[jnp.minimum(slots, flat.size - 1)], 0.0)
    return _gathered(x, jnp.minimum(slots // p.nnz, p.d - 1), weights, axis)


def _lift(z: jax.Array, p: SparseProjector | None, *, axis: int) -> jax.Array:
    """Maps an axis of length `size` to `d`."""
    if p is None:
        return z.astype(jnp.float32)
    if p.cached is not None:
        return _dense_product(z, p.cached.swapaxes(-1, -2), axis)
    return _gathered(z, p.indices.astype(jnp.int32), p.values.astype(jnp.float32), axis)


def _dense_product(x: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    left, right = (x, matrix) if axis == -1 else (matrix.swapaxes(-1, -2), x)
    return jnp.matmul(
        left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _gathered(
    x: jax.Array, index: jax.Array, weights: jax.Array, axis: int, plus: jax.Array | None = None
) -> jax.Array:
    """`plus + sum_k weights[:, k] * take(x, index[:, k])` along `axis`, holding few terms."""
    index, weights = index.T, weights.T  # (terms, length of the new axis)

    def term(k: Any) -> jax.Array:
        taken = jnp.take(x, index[k], axis=axis, mode="clip").astype(jnp.float32)
        return taken * (weights[k] if axis == -1 else weights[k][:, None])

    # At least two trips: XLA would inline a single one, and then fuse all of it, term by term, into
    # each gather of a product that follows, computing every entry many times.
    count = len(index)
    fused = max(1, min(_FUSED, count // 2))
    first = count % fused if count > 1 else 1

    def trip(i: Any, total: jax.Array) -> jax.Array:
        return sum((term(first + i * fused + k) for k in range(fused)), total)

    if plus is None:
        plus = jnp.zeros(jax.eval_shape(term, 0).shape, jnp.float32)
    total = sum((term(k) for k in range(first)), plus)
    return jax.lax.fori_loop(0, (count - first) // fused, trip, total)
