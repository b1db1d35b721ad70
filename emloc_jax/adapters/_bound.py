"""How much of a correction is applied (arrays only)."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from emloc_jax.adapters._stack import each_matrix
from emloc_jax.adapters._terms import CorrectionTerms
from emloc_jax.errors import RatioError

__all__ = ["Bound", "apply_bound", "bound_gain", "check_limit"]

Bound = Literal["row", "kernel", "column"]


@partial(jax.jit, static_argnames="bound")
def bound_gain(terms: CorrectionTerms, limit: jax.Array | float, *, bound: Bound) -> jax.Array:
    """The share of `delta` that is subtracted: `g = min(1, limit · size(b') / size(Delta))`.

    - `'row'` (EMLoC Algorithm 1): one `g` per row, size = mean absolute value.
    - `'kernel'`: one `g` per kernel, size = Frobenius norm.
    - `'column'`: one `g` per output, size = Euclidean norm of the column.

    The last two do not depend on the basis, which for nearly equal singular values of `lora_a`
    is arbitrary. `limit = inf` gives 1 even where nothing was learned; a zero `Delta` gives 1.

    Args:
      terms: of one adapter.
      limit: scalar, at least 0.
      bound: which sizes are compared.

    Returns:
      (*stack, rank, 1), (*stack, 1, 1) or (*stack, 1, d_out); broadcasts against `delta`.

    Example:
      >>> delta = jnp.array([[4.0, 4.0], [1.0, 1.0], [0.0, 0.0]])
      >>> learned = jnp.array([[2.0, 2.0], [2.0, 2.0], [0.0, 0.0]])
      >>> terms = CorrectionTerms(jnp.eye(3), learned, delta, jnp.ones(3, bool))
      >>> bound_gain(terms, 1.0, bound="row").ravel().tolist()
      [0.5, 1.0, 1.0]
    """
    size = {
        "row": lambda x: jnp.abs(x).mean(-1, keepdims=True),
        "kernel": lambda x: jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True)),
        "column": lambda x: jnp.sqrt(jnp.square(x).sum(-2, keepdims=True)),
    }[bound]
    error = size(terms.delta)
    allowed = jnp.where(jnp.isinf(limit), jnp.inf, limit * size(terms.learned))  # no inf · 0
    return jnp.where(error > allowed, allowed / jnp.where(error > 0, error, 1.0), 1.0)


def apply_bound(terms: CorrectionTerms, limit: jax.Array | float, *, bound: Bound) -> jax.Array:
    """The corrected `lora_b` that goes with `terms.basis`: `b'' = b' - g · Delta`.

    Args:
      terms: of one adapter.
      limit: scalar, at least 0; 0 gives `b'`, infinity the full correction.
      bound: see `bound_gain`.

    Returns:
      (*stack, rank, d_out), float32.

    Example:
      >>> terms = CorrectionTerms(
      ...     jnp.eye(1), jnp.array([[1.0]]), jnp.array([[4.0]]), jnp.ones(1, bool)
      ... )
      >>> [float(apply_bound(terms, x, bound="row")[0, 0]) for x in (0.0, 1.0, jnp.inf)]
      [1.0, 0.0, -3.0]
    """
    one = partial(_apply_one, limit=jnp.asarray(limit, jnp.float32), bound=bound)
    return each_matrix(one, terms.basis.shape[:-2], terms)


@partial(jax.jit, static_argnames="bound")
def _apply_one(terms: CorrectionTerms, *, limit: jax.Array, bound: Bound) -> jax.Array:
    return terms.learned - bound_gain(terms, limit, bound=bound) * terms.delta


def check_limit(limit: float, bound: Bound) -> None:
    """Refuses a limit below 0 or NaN, and an unknown bound.

    Raises:
      RatioError: naming the value and what is possible.
    """
    if not limit >= 0:
        raise RatioError(
            f"`limit` must be 0 (no correction), a positive number or infinity (unbounded); "
            f"got {limit!r}."
        )
    if bound not in get_args(Bound):
        raise RatioError(f"`bound` must be one of {', '.join(get_args(Bound))}; got {bound!r}.")
