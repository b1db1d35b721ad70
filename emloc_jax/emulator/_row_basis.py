"""A wide kernel as a square one times a basis of its rows."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from emloc_jax.emulator._products import matmul

__all__ = ["through_row_basis"]

T = TypeVar("T")

_ACCEPT = 1e-3  # Bound on the relative change of a squared error; 1.001 allows twice that.
_PROBES = 16


def through_row_basis(
    kernel: jax.Array,
    use: Callable[[jax.Array, Callable[[jax.Array], jax.Array]], T],
) -> T:
    """Calls `use(core, times_basis)` with `kernel = core @ basis`, `basis` with orthonormal rows.

    `basis` is only ever applied: `times_basis(rows) = rows @ basis`. A Cholesky factor `L` of
    `K K^T` as core, with `basis = L^-1 K`, does it at matmul speed for the kernels that occur. With
    `L L^T = K K^T + E`, every weighted squared error changes by a factor within
    `1 +- ||L^-1 E L^-T||`, which is about `eps ||L^-1||^2` and is measured by random probes. Where
    that is not small (dependent rows, a zero row, a failed Cholesky), Householder QR, which is
    always exact but slow, takes its place.

    Args:
      kernel: `(m, n)` with `m <= n`.
      use: gets `core (m, m)` and `times_basis: (r, m) -> (r, n)`; returns arrays.
    """
    gram = matmul(kernel, kernel.mT)
    norms = jnp.sqrt(jnp.diagonal(gram))[:, None]
    norms = jnp.where(norms > 0, norms, 1)  # Scaled rows have the lowest condition number.
    lower = jnp.linalg.cholesky(gram / (norms * norms.mT))
    probes = jax.random.rademacher(jax.random.key(0), (kernel.shape[0], _PROBES), kernel.dtype)
    inverse = jnp.sum(solve_triangular(lower, probes, lower=True) ** 2) / _PROBES

    def by_cholesky() -> T:
        def times_basis(rows: jax.Array) -> jax.Array:
            rows = solve_triangular(lower, rows.mT, trans="T", lower=True).mT
            return matmul(rows / norms.mT, kernel)

        return use(norms * lower, times_basis)

    def by_householder() -> T:
        q, r = jnp.linalg.qr(kernel.mT)
        return use(r.mT, lambda rows: matmul(rows, q.mT))

    # A failed Cholesky gives NaN, which compares false.
    accept = jnp.finfo(kernel.dtype).eps * inverse < _ACCEPT
    return jax.lax.cond(accept, by_cholesky, by_householder)
