"""Adam's moments carried from one subspace into another."""

import jax
import jax.numpy as jnp

from emloc_jax.kernels import SparseProjector, cross
from emloc_jax.offload._adam import SubspaceMoments
from emloc_jax.offload._error import matmul

__all__ = ["transport"]

Pair = tuple[SparseProjector | None, SparseProjector | None]


def transport(moments: SubspaceMoments, *, old: Pair, new: Pair) -> SubspaceMoments:
    """Moments of the compressed gradient in the `new` subspace, from those in the `old` one.

    LSP-Offload, algorithm 1: with `A = P_new^T P_old` and `B = Q_new^T Q_old`,

        mu' = A mu B^T,    nu' = (A * A) nu (B * B)^T        (* is elementwise)

    `mu'` is the mean lifted to the kernel and compressed again. `nu'` is exact for independent
    entries of mean zero, and never negative. `count` stays. Unless the columns of a projector are
    orthonormal, transport onto the very same pair changes the moments, so call it only for a pair
    that has changed; and never to leave a pair that was not fitted, whose `A` inflates `nu` many
    times over: zero moments are better there.

    Args:
      moments: `(*stack, s_in, s_out)`.
      old: pair that `moments` belong to; None for a side that is not compressed.
      new: pair to go to, over the same kernel; its subspace may have other sizes.

    Returns:
      Moments `(*stack, s_in', s_out')` in the dtypes of the old ones.

    Example:
      >>> from emloc_jax.kernels import identity_projector
      >>> from emloc_jax.offload._adam import init_moments
      >>> swap = identity_projector(2, [1, 0])
      >>> moments = init_moments((2, 1)).replace(mu=jnp.array([[1.0], [2.0]]))
      >>> transport(moments, old=(None, None), new=(swap, None)).mu.tolist()
      [[2.0], [1.0]]
    """
    left, right = cross(new[0], old[0]), cross(new[1], old[1])

    def both(moment: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
        result = moment.astype(jnp.float32)
        result = result if left is None else matmul(left, result)
        result = result if right is None else matmul(result, right.swapaxes(-1, -2))
        return result.astype(moment.dtype)

    def square(matrix: jax.Array | None) -> jax.Array | None:
        return None if matrix is None else matrix * matrix

    return SubspaceMoments(
        mu=both(moments.mu, left, right),
        nu=both(moments.nu, square(left), square(right)),
        count=moments.count,
    )
