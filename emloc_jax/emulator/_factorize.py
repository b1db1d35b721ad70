"""Best low-rank kernels under a weighted norm, by the cheaper side and without inverses of `C`.

Minimises `||C^1/2 (K - K_E) G^1/2||_F` over `K_E` of rank `r`, for all `r` at once. With `C` alone
this is the paper's problem (EMLoC, arXiv 2506.12015, section 3.1; SVD-LLM, arXiv 2403.07378); with
`G = sum g g^T` it weighs outputs by how much the loss cares. By Eckart-Young the optimum is the
truncated SVD of `S^T K T` for any roots `S S^T = C`, `T T^T = G`, mapped back by `S^-T`, `T^-1`.
What follows needs a root of at most one of the two, on the side where it is the smaller matrix; of
the other moment only its form in the kernel, `K^T C K`, which is all that a `CompactMoment` holds.
"""

import functools
import math

import jax
import jax.numpy as jnp

from emloc_jax.emulator._damping import damped, damped_through, root
from emloc_jax.emulator._factorization import Factorization
from emloc_jax.emulator._moments import CompactMoment
from emloc_jax.emulator._products import matmul
from emloc_jax.emulator._ranks import break_even_rank
from emloc_jax.emulator._row_basis import through_row_basis
from emloc_jax.emulator._spectral import right_singular
from emloc_jax.errors import MomentShapeError

__all__ = ["factorize"]

ONE_SIDED_DAMPING = 1e-7
TWO_SIDED_DAMPING = 1e-3

_SMALL_SIDE = (
    "A compact {1} serves the larger side of a kernel only, but the {0} side of this one "
    "(d_in={2}, d_out={3}) is not. Calibrate with moments='full', or on this very kernel."
)


def factorize(
    kernel: jax.Array,
    moment: jax.Array | CompactMoment | None = None,
    gradient: jax.Array | CompactMoment | None = None,
    *,
    damping: float | None = None,
    max_rank: int | None = None,
) -> Factorization:
    """Factors a kernel so that every rank is optimal for the given weights.

    Without weights this is the plain SVD; with `moment`, the activation-aware one-sided form; with
    both, the two-sided form. Runs jitted, in the dtype of `kernel` (float64 if JAX allows it), else
    in fp32; stacked kernels run one after the other through the same program.

    In fp32 the error is within 1.001 of the float64 optimum as long as the optimal relative error
    is above about 5e-3 for any moments, and above 5e-4 where large features are single coordinates
    of the input, as they are in language models. Below, an fp32 `moment` itself is too coarse. Of
    compact moments only the first bound holds: a large feature, once it went through the kernel, is
    no single coordinate any more. One-sided, at an optimum of 1e-3, they end about 5 % above it.

    Args:
      kernel: `(*stack, d_in, d_out)`.
      moment: `C = sum x x^T`, `(*stack, d_in, d_in)`; may be singular. Where `d_in >= d_out`, a
        `CompactMoment` will do.
      gradient: `G = sum g g^T`, `(*stack, d_out, d_out)`; may be singular. Where `d_out > d_in`, a
        `CompactMoment` will do.
      damping: ridge on both moments in units of their mean eigenvalue; by default 1e-7 for the
        one-sided form and 1e-3 for the two-sided one.
      max_rank: factors to keep; by default up to the break-even rank, beyond which a factored
        kernel is larger than the kernel.

    Returns:
      A `Factorization`.

    Raises:
      MomentShapeError: a compact moment on the smaller side of the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel, inputs = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[9.0, 0.0], [0.0, 1.0]])
      >>> left, right = factorize(kernel, inputs.T @ inputs, max_rank=1).truncate(1)
      >>> (left @ right).round(3) + 0.0  # the small entry is kept: its input is large
      Array([[1., 0.],
             [0., 0.]], dtype=float32)
    """
    if gradient is not None and moment is None:
        raise ValueError("The gradient moment weighs together with an input moment; pass both.")
    d_in, d_out = kernel.shape[-2:]
    if max_rank is None:
        max_rank = max(1, break_even_rank(d_in, d_out))
    if damping is None:
        damping = ONE_SIDED_DAMPING if gradient is None else TWO_SIDED_DAMPING
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    if isinstance(moment, CompactMoment) and d_in < d_out:
        raise MomentShapeError(_SMALL_SIDE.format("input", "`moment`", d_in, d_out))
    if isinstance(gradient, CompactMoment) and d_out <= d_in:
        raise MomentShapeError(_SMALL_SIDE.format("output", "`gradient`", d_in, d_out))
    moment, gradient = jax.tree.map(lambda w: jnp.asarray(w, dtype), (moment, gradient))
    rank = min(max_rank, d_in, d_out)
    return _factorize_stack(jnp.asarray(kernel, dtype), moment, gradient, float(damping), rank)


def _factorize_stack(kernel, moment, gradient, damping, rank) -> Factorization:
    """One matrix after the other: decompositions are not batched inside LAPACK anyway.

    One program for a matrix, whether it stands alone or in a stack, so that a model whose layers
    are factored as they come from a disk gets the very numbers that it gets whole.
    """
    stack = kernel.shape[:-2]
    arrays = (kernel, moment, gradient)
    weighting = "plain" if moment is None else "one_sided" if gradient is None else "two_sided"
    if not stack:
        return Factorization(
            *_factorize_one(kernel, moment, gradient, damping, rank), weighting=weighting
        )
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(stack) :]), arrays)
    results = None
    for index in range(math.prod(stack)):
        own = jax.tree.map(lambda a, index=index: a[index], flat)
        one = _factorize_one(*own, damping, rank)
        if results is None:
            results = tuple(jnp.zeros((math.prod(stack), *a.shape), a.dtype) for a in one)
        results = _place(results, one, index)  # in place: the results are never there twice
    assert results is not None
    return Factorization(*(a.reshape(*stack, *a.shape[1:]) for a in results), weighting=weighting)


@functools.partial(jax.jit, donate_argnums=0)
def _place(results, one, index):
    return tuple(whole.at[index].set(part) for whole, part in zip(results, one, strict=True))


@functools.partial(jax.jit, static_argnames=("damping", "rank"))
def _factorize_one(kernel, moment, gradient, damping, rank):
    """`(left, right, squares)` with rows of `right` of unit norm."""
    left, right, squares = _factorize_matrix(kernel, moment, gradient, damping, rank)
    norms = jnp.linalg.norm(right, axis=1)
    norms = jnp.where(norms > 0, norms, 1)
    # One place to look: `squares` is NaN if anything is.
    finite = jnp.isfinite(left).all() & jnp.isfinite(right).all()
    return left * norms, right / norms[:, None], jnp.where(finite, squares, jnp.nan)


def _factorize_matrix(kernel, moment, gradient, damping, rank):
    """`(left, right, squares)` of one kernel `(d_in, d_out)` and its moments."""
    if moment is None:
        finite = jnp.isfinite(kernel).all()  # LAPACK may loop forever on a kernel that is not.
        left, values, right = jnp.linalg.svd(jnp.where(finite, kernel, 0), full_matrices=False)
        squares = jnp.where(finite, values**2, jnp.nan)
        return (left * values)[:, :rank], right[:rank], squares
    moment, scale = _damped(moment, kernel, damping)
    if gradient is None:
        left, right, squares = _one_sided(kernel, moment, rank)
        return left, right, squares * scale
    gradient, gradient_scale = _damped(gradient, kernel.mT, damping)
    left, right, squares = _two_sided(kernel, moment, gradient, damping, rank)
    return left, right, squares * scale * gradient_scale


def _damped(moment, kernel, damping):
    if isinstance(moment, CompactMoment):
        return damped_through(moment, kernel, damping)
    return damped(moment, damping)


def _one_sided(kernel, moment, rank):
    """`K_E = K R R^T`, with `R` the right singular vectors of `S^T K`.

    A wide kernel `K = L Q`, `Q Q^T = 1`, has those of `S^T L` times `Q`, so that the decomposition
    is of the size of its small side.
    """
    if isinstance(moment, CompactMoment):
        eye = jnp.eye(kernel.shape[1], dtype=kernel.dtype)
        squares, vectors = right_singular(eye, moment.through, rank)
        return matmul(kernel, vectors[:, :rank]), vectors[:, :rank].mT, squares
    if kernel.shape[1] <= kernel.shape[0]:
        squares, vectors = right_singular(kernel, moment, rank)
        return matmul(kernel, vectors[:, :rank]), vectors[:, :rank].mT, squares

    def square(core, times_basis):
        squares, vectors = right_singular(core, moment, rank)
        vectors = vectors[:, :rank]
        return matmul(core, vectors), times_basis(vectors.mT), squares

    return through_row_basis(kernel, square)


def _two_sided(kernel, moment, gradient, damping, rank):
    """`K_E = (K T) R R^T T^-1`, with `R` the right singular vectors of `S^T K T`.

    Only the output side needs a root, `T T^T = G`. A wide kernel is the same problem transposed,
    where that side is the input.
    """
    if kernel.shape[1] > kernel.shape[0]:
        left, right, squares = _two_sided(kernel.mT, gradient, moment, damping, rank)
        return right.mT, left.mT, squares
    output_root, times_inverse = root(gradient, damping)
    factor = matmul(kernel, output_root)
    if isinstance(moment, CompactMoment):  # (K T)^T C (K T) = T^T (K^T C K) T
        squares, vectors = right_singular(output_root, moment.through, rank)
    else:
        squares, vectors = right_singular(factor, moment, rank)
    vectors = vectors[:, :rank]
    return matmul(factor, vectors), times_inverse(vectors.mT), squares
