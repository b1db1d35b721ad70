"""Products and eigenvalues at full precision, safe against NaN."""

import jax
import jax.numpy as jnp

__all__ = ["eigh", "matmul"]


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` at the highest precision: Gram matrices do not forgive TF32 or bf16 passes."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ascending eigenvalues and eigenvectors of the symmetric part of `matrix (d, d)`.

    The values are NaN if the matrix is not finite; LAPACK, which may loop forever on such a matrix,
    never sees it.
    """
    finite = jnp.isfinite(matrix).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    return jnp.where(finite, values, jnp.nan), vectors
