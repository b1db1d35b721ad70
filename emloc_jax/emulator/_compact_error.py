"""The error of stored factors, from a compact moment."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from emloc_jax.emulator._moments import CompactMoment
from emloc_jax.emulator._products import matmul

__all__ = ["compact_square"]

# Cholesky of `K^T K` is safe with a ridge of this many epsilons of its trace; what the ridge leaves
# over shrinks with every round of refinement.
_SAFE = 10
_ROUNDS = 3


def compact_square(
    kernel: jax.Array, left: jax.Array, right: jax.Array, moment: CompactMoment
) -> jax.Array:
    """`||X (K - L R)||^2` without `X^T X`.

    Factors lie in the columns of the kernel, `L = K A`, up to the rounding that they are stored
    with. `A` comes from least squares, and with the rest `E = L - K A`

        ||X (K - L R)||^2 = tr((1 - A R)^T K^T C K (1 - A R)) + ||X E R||^2 - cross term.

    The first is exact for any `A`. Of the rest only the diagonal of `C` is known, which gives the
    expectation of both other terms for roundings that are independent between the features. In bf16
    they are about 1e-3 of the kernel, below any error that compression leaves.

    Args:
      kernel: `(d_in, d_out)`, fp32.
      left: `(d_in, rank)`, as stored.
      right: `(rank, d_out)`, as stored.
      moment: of the inputs.

    Returns:
      A scalar; not negative up to rounding.

    Example:
      >>> kernel, x = jnp.array([[2.0], [1.0]]), jnp.array([[1.0, 0.0], [2.0, 3.0]])
      >>> y = x @ kernel
      >>> moment = CompactMoment(y.T @ y, jnp.sum(x**2, 0))
      >>> left, right = kernel / 2, jnp.ones((1, 1))
      >>> round(float(compact_square(kernel, left, right, moment)), 3), float(jnp.sum((y / 2)**2))
      (13.25, 13.25)
    """
    left, right = left.astype(kernel.dtype), right.astype(kernel.dtype)
    gram = matmul(kernel.mT, kernel)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    ridge = _SAFE * jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    lower = jnp.linalg.cholesky(gram + jnp.where(ridge > 0, ridge, 1) * eye)
    inside, rest = jnp.zeros((gram.shape[0], left.shape[1]), gram.dtype), left
    for _ in range(_ROUNDS):
        inside += cho_solve((lower, True), matmul(kernel.mT, rest))
        rest = left - matmul(kernel, inside)
    gap = eye - matmul(inside, right)
    outside = jnp.sum(rest * matmul(rest, matmul(right, right.mT)), axis=1)
    return jnp.sum(gap * matmul(moment.through, gap)) + jnp.sum(moment.diagonal * outside)
