"""The objective of a fit, and its gradient at the non-zeros of both projectors."""

from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.kernels import SparseProjector, project_matrix
from emloc_jax.offload._error import estimate, matmul

__all__ = ["objective_gradient"]

Pair = tuple[SparseProjector | None, SparseProjector | None]

# Below this error the gradient of the root is that of the square, so it stays finite.
_SMALLEST_ERROR = 1e-4


def objective_gradient(
    g: jax.Array, norm: jax.Array, pair: Pair, beta: Any
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """The estimation error, and the gradient of the objective with respect to the values.

        objective = error + beta (||P||_F / sqrt(d_in) + ||Q||_F / sqrt(d_out))

    A side that is not compressed has no norm term and no gradient.

    Derivation. Let `||G|| = 1`, `A = G Q`, `C = P^T A`, `M = P^T P`, `N = Q^T Q` and
    `f = error^2 = 1 - 2 <C, C> + <C, M C N>`. A change `dP` gives `dC = dP^T A` and
    `dM = dP^T P + P^T dP`, so with `R = M C N`

        df = -4 <C, dP^T A> + 2 <R, dP^T A> + <dM, C N C^T>
           = <A (2 R - 4 C)^T + 2 P (C N C^T), dP>

    where the last term uses that `C N C^T` is symmetric. The error of `G^T` under `(Q, P)` is the
    same number, which gives the other side:

        grad_Q f = (G^T P) (2 R - 4 C) + 2 Q (C^T M C).

    Only the entries at the non-zeros are needed: entry `(i, j)` of `A X^T` is the product of row
    `i` of `A` with row `j` of `X`, a gather. Finally `d error = df / (2 error)`.

    Args:
      g: `(d_in, d_out)`.
      norm: its Frobenius norm.
      pair: projectors without cached copies.
      beta: weight of the norms.

    Returns:
      fp32 scalar error (without the norms), and gradients of the shapes of the values.
    """
    p, q = pair
    terms = estimate(g, norm, p, q)
    pull = 2 * terms.response - 4 * terms.core  # (s_in, s_out)
    root = 2 * jnp.maximum(terms.error, _SMALLEST_ERROR)
    grad_p = grad_q = None
    if p is not None:
        spread = matmul(_times(terms.core, terms.gram_out), terms.core.T)
        grad_p = _at_positions(p, terms.rows, pull, 2 * spread) / root
        grad_p = grad_p + beta * _norm_gradient(p)
    if q is not None:
        spread = matmul(_times(terms.core.T, terms.gram_in), terms.core)
        grad_q = _at_positions(q, _columns(g, norm, p), pull.T, 2 * spread) / root
        grad_q = grad_q + beta * _norm_gradient(q)
    return terms.error, (grad_p, grad_q)


def _columns(g: jax.Array, norm: jax.Array, p: SparseProjector | None) -> jax.Array:
    """`G^T P / ||G||`, `(d_out, s_in)`."""
    return project_matrix(g, p, None).T / jnp.where(norm == 0, 1.0, norm)


def _times(left: jax.Array, right: jax.Array | None) -> jax.Array:
    return left if right is None else matmul(left, right)


def _at_positions(
    p: SparseProjector, rows: jax.Array, pull: jax.Array, spread: jax.Array
) -> jax.Array:
    """Entries of `rows @ pull.T + P @ spread` at the non-zeros of `p`.

    One non-zero of every row at a time, so that nothing is larger than `rows`.

    Args:
      p: `(d, s)`.
      rows: `(d, n)`.
      pull: `(s, n)`.
      spread: `(s, s)`.
    """
    indices, values = p.indices.astype(jnp.int32), p.values.astype(jnp.float32)

    def one(column: jax.Array) -> jax.Array:
        direct = jnp.sum(rows * pull[column], axis=-1)
        return direct + jnp.sum(values * spread[indices, column[:, None]], axis=-1)

    return jax.lax.map(one, indices.T).T


def _norm_gradient(p: SparseProjector) -> jax.Array:
    """Gradient of `||P||_F / sqrt(d)` with respect to the values."""
    values = p.values.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(values * values))
    return values / (jnp.maximum(norm, jnp.finfo(jnp.float32).tiny) * p.d**0.5)
