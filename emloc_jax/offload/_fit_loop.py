"""The loop of a fit: Adam on the values of one pair, keeping the best ones seen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emloc_jax.kernels import SparseProjector, uncache, with_values
from emloc_jax.offload._adam import AdamOptions, SubspaceMoments, adam_direction, init_moments
from emloc_jax.offload._error import estimate, estimation_error, frobenius_norm
from emloc_jax.offload._fit_gradient import objective_gradient
from emloc_jax.offload._fit_options import FitNumbers, FitOptions, FitReport

__all__ = ["FitState", "advance", "finish", "fit_in_jit", "start"]

Pair = tuple[SparseProjector | None, SparseProjector | None]
Values = tuple[Any, Any]  # fp32 values of both sides; None for a side that is not compressed

_ADAM = AdamOptions()


class FitState(NamedTuple):
    """A fit under way: after the given values `evaluated` others were tried; `values` are next."""

    evaluated: jax.Array
    norm: jax.Array
    values: Values
    moments: tuple[Any, Any]  # SubspaceMoments of both sides, or None
    best_values: Values
    best_error: jax.Array
    first_error: jax.Array


def fit_in_jit(
    g: jax.Array,
    p: SparseProjector | None,
    q: SparseProjector | None,
    options: FitOptions | FitNumbers,
) -> tuple[SparseProjector | None, SparseProjector | None, FitReport]:
    """`fit` of one matrix as a pure function, for use inside `jit`; it cannot watch the time.

    A `g` with a NaN or an infinity leaves the pair as it is and reports NaN.
    """
    state = advance(g, p, q, start(g, p, q), options, options.steps)
    return finish(g, p, q, state)


def start(g: jax.Array, p: Any, q: Any) -> FitState:
    """The state before the first step: the given values are the best so far, and scaled ones next.

    Of all multiples `c` of the estimate, `c = ||C||^2 / <C, M C N>` has the smallest error (names
    as in `objective_gradient`). Fresh projectors are far too large: scaling brings their error
    from well above 2 below 1 at once, which spares Adam the first third of its steps.
    """
    norm = frobenius_norm(g)
    given: Any = tuple(None if x is None else x.values.astype(jnp.float32) for x in (p, q))
    terms = estimate(g, norm, *_pair((p, q), given))
    whole, response = jnp.sum(terms.core**2), jnp.sum(terms.core * terms.response)
    scale = jnp.where((whole > 0) & (response > 0), whole / response, 1.0)
    sides = sum(v is not None for v in given)
    # Values of a side occur twice in the estimate.
    values: Any = tuple(None if v is None else v * scale ** (0.5 / sides) for v in given)
    moments: Any = tuple(None if v is None else init_moments(v.shape) for v in given)
    zero = jnp.zeros((), jnp.int32)
    return FitState(zero, norm, values, moments, given, terms.error, terms.error)


def advance(
    g: jax.Array,
    p: Any,
    q: Any,
    state: FitState,
    options: FitOptions | FitNumbers,
    limit: Any,
) -> FitState:
    """Goes on until `limit` steps are done in all or the threshold is reached.

    The estimation error decides which values are the best and when to stop; the norms of the
    objective only steer.
    """

    def wanted(state: FitState) -> jax.Array:
        # The scaled values are evaluated before any step, hence `<=`.
        return (
            (state.evaluated <= limit)
            & (state.best_error > options.threshold)
            & ~jnp.isnan(state.first_error)
        )

    def body(state: FitState) -> FitState:
        pair = _pair((p, q), state.values)
        error, gradient = objective_gradient(g, state.norm, pair, options.beta)
        better = error < state.best_error
        rate = _rate(state.evaluated, options)
        stepped = [
            (None, None) if v is None else _adam_step(v, slope, moments, rate)
            for v, slope, moments in zip(state.values, gradient, state.moments, strict=True)
        ]
        return FitState(
            evaluated=state.evaluated + 1,
            norm=state.norm,
            values=(stepped[0][0], stepped[1][0]),
            moments=(stepped[0][1], stepped[1][1]),
            best_values=jax.tree.map(
                lambda new, old: jnp.where(better, new, old), state.values, state.best_values
            ),
            best_error=jnp.where(better, error, state.best_error),
            first_error=state.first_error,
        )

    if p is None and q is None:
        return state  # nothing to learn
    return jax.lax.while_loop(wanted, body, state)


def finish(
    g: jax.Array, p: Any, q: Any, state: FitState
) -> tuple[SparseProjector | None, SparseProjector | None, FitReport]:
    """The best pair in the dtype of the old one, or the old one where that is no better."""
    cast: Any = tuple(
        None if x is None else v.astype(x.values.dtype)
        for x, v in zip((p, q), state.best_values, strict=True)
    )
    error = state.best_error
    if any(x is not None and x.values.dtype != jnp.float32 for x in (p, q)):
        error = estimation_error(g, *_pair((p, q), cast))  # rounding may have cost something
    better = error < state.first_error
    new = [
        None if x is None else with_values(x, jnp.where(better, v, x.values))
        for x, v in zip((p, q), cast, strict=True)
    ]
    after = jnp.where(better, error, state.first_error)
    steps = jnp.maximum(state.evaluated - 1, 0)
    return new[0], new[1], FitReport(state.first_error, after, steps)


def _pair(pair: Any, values: Any) -> Pair:
    """The positions of `pair` with fp32 values, sparse products only."""
    first, second = (
        None if x is None else with_values(uncache(x), v) for x, v in zip(pair, values, strict=True)
    )
    return first, second


def _adam_step(
    values: jax.Array, gradient: Any, moments: SubspaceMoments, rate: jax.Array
) -> tuple[jax.Array, SubspaceMoments]:
    direction, moments = adam_direction(gradient, moments, _ADAM)
    return values - rate * direction, moments


def _rate(step: jax.Array, options: FitOptions | FitNumbers) -> jax.Array:
    half_cosine = (1 + jnp.cos(jnp.pi * step / options.steps)) / 2
    return options.learning_rate * (options.decay_to + (1 - options.decay_to) * half_cosine)
