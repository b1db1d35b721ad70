"""How much of a gradient a pair of projectors loses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emloc_jax.kernels import SparseProjector, gram, project, project_matrix

__all__ = ["Estimate", "estimate", "estimation_error", "frobenius_norm", "matmul"]


class Estimate(NamedTuple):
    """What the estimation error of one pair is made of, for `g` of norm one.

    Attributes:
      rows: `G Q`, `(d_in, s_out)`.
      core: `P^T G Q`, `(s_in, s_out)`.
      gram_in: `P^T P`, or None for the identity.
      gram_out: `Q^T Q`, or None for the identity.
      response: `gram_in @ core @ gram_out`.
      error: fp32 scalar.
    """

    rows: jax.Array
    core: jax.Array
    gram_in: jax.Array | None
    gram_out: jax.Array | None
    response: jax.Array
    error: jax.Array


def estimation_error(
    g: jax.Array, p: SparseProjector | None, q: SparseProjector | None
) -> jax.Array:
    """Relative estimation error `||P P^T G Q Q^T - G||_F / ||G||_F` of LSP-Offload (definition 2).

    With `C = P^T G Q`, the squared norm above is

        ||G||^2 - 2 ||C||^2 + <C, (P^T P) C (Q^T Q)>

    because `<P C Q^T, G> = <C, P^T G Q>`; so nothing of the size of `g` is formed. In fp32 the
    difference resolves errors down to about 1e-3; below that it says 0 or about that much.

    Args:
      g: `(*stack, d_in, d_out)`, any float dtype.
      p: `(d_in, s_in)`, or None for the identity.
      q: `(d_out, s_out)`, or None for the identity.

    Returns:
      fp32 `(*stack,)`: 0 where `g` is zero, NaN where it is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.kernels import dense_projector
      >>> first_column = dense_projector(jnp.array([[1.0], [0.0]]))
      >>> error = estimation_error(jnp.array([[4.0, 3.0], [0.0, 0.0]]), None, first_column)
      >>> round(float(error), 4)
      0.6
    """
    if g.ndim > 2:
        return jax.vmap(estimation_error)(g, p, q)
    return estimate(g, frobenius_norm(g), p, q).error


def frobenius_norm(g: jax.Array) -> jax.Array:
    """fp32 norm of all entries, safe from overflow and underflow of the squares."""
    peak = jnp.max(jnp.abs(g)).astype(jnp.float32)
    safe = jnp.where(peak > 0, peak, 1.0)
    return peak * jnp.sqrt(jnp.sum((g.astype(jnp.float32) / safe) ** 2))


def estimate(
    g: jax.Array, norm: jax.Array, p: SparseProjector | None, q: SparseProjector | None
) -> Estimate:
    """The products behind `estimation_error`, for one matrix `g` of Frobenius norm `norm`."""
    safe = jnp.where(norm == 0, 1.0, norm)
    rows = project(g, q) / safe
    core = project_matrix(rows, p, None)
    gram_in, gram_out = gram(p), gram(q)
    response = core if gram_in is None else matmul(gram_in, core)
    response = response if gram_out is None else matmul(response, gram_out)
    one = norm / safe  # 0 for a zero gradient, NaN for one that is not finite
    square = one - 2 * jnp.sum(core * core) + jnp.sum(core * response)
    return Estimate(rows, core, gram_in, gram_out, response, jnp.sqrt(jnp.maximum(square, 0.0)))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """fp32 product at the highest precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
