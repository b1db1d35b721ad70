"""Learning the values of projectors on given gradients."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from emloc_jax.errors import NonFiniteError, ProjectorError
from emloc_jax.kernels import SparseProjector
from emloc_jax.offload._fit_loop import FitState, advance, finish, start
from emloc_jax.offload._fit_options import DEFAULT_FIT, FitNumbers, FitOptions, FitReport

__all__ = ["fit", "fit_programs"]

# Steps between two looks at the clock.
_CHUNK = 10


def fit(
    g: jax.Array,
    p: SparseProjector | None,
    q: SparseProjector | None,
    options: FitOptions = DEFAULT_FIT,
) -> tuple[SparseProjector | None, SparseProjector | None, FitReport]:
    """Learns the values of a pair so that `P P^T G Q Q^T` comes close to `g`.

    Adam on the values, positions stay (LSP-Offload, algorithm 1, lines 4 to 8). Given values are
    the start: a fitted pair continues from where it is, a pair from `make_projector` begins afresh.
    The best values seen are returned, and the old ones if none was better. In fp32, by sparse
    products; matrices of a batch are fitted one after the other, in the memory of one.

    Args:
      g: `(d_in, d_out)`, or `(k, d_in, d_out)` together with stacked projectors.
      p: `(d_in, s_in)`, or None for the identity.
      q: `(d_out, s_out)`, or None for the identity.
      options: limits and rates. A time limit is looked at every few steps, and counts compilation.

    Returns:
      New `p` and `q`, and a `FitReport`.

    Raises:
      NonFiniteError: a NaN or an infinity in `g`.
      ProjectorError: shapes of `g` and of the projectors do not fit, or the batch is empty.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.kernels import make_projector
      >>> p, q = make_projector(0, 8, 4, 2), make_projector(1, 8, 4, 2)
      >>> p, q, report = fit(jnp.ones((8, 8)), p, q, FitOptions(steps=30))
      >>> bool(report.error_before > 1), bool(report.error_after < 0.3)
      (True, True)
    """
    _check(g, p, q)
    begin, numbers = time.monotonic(), options.numbers()
    state = _start(g, p, q)
    chunk = options.steps if options.time_limit is None else _CHUNK
    for limit in range(chunk, options.steps + chunk, chunk):
        state = _advance(g, p, q, state, numbers, min(limit, options.steps))
        if options.time_limit is not None:
            jax.block_until_ready(state)
            if time.monotonic() - begin >= options.time_limit:
                break
    new_p, new_q, report = _finish(g, p, q, state)
    bad = np.flatnonzero(np.isnan(report.error_before))
    if len(bad):
        raise NonFiniteError(
            f"A fit was asked for on {len(g) if g.ndim == 3 else 1} gradients; number "
            f"{', '.join(map(str, bad))} holds a NaN or an infinity. Leave out the batches that "
            "produced it."
        )
    return new_p, new_q, report


def fit_programs(g: Any, p: Any, q: Any) -> Iterator[jax.stages.Lowered]:
    """The programs of a fit, lowered for arrays or shapes `g`, `p` and `q`."""
    state = jax.eval_shape(_start, g, p, q)
    yield _start.lower(g, p, q)
    yield _advance.lower(g, p, q, state, DEFAULT_FIT.numbers(), 1)
    yield _finish.lower(g, p, q, state)


# One matrix is not made a batch of one: outside of a program that would copy it.
def _each(function: Callable[..., Any], g: jax.Array, *rest: Any) -> Any:
    if g.ndim == 2:
        return function(g, *rest)
    return jax.lax.map(lambda x: function(*x), (g, *rest))


@jax.jit
def _start(g: Any, p: Any, q: Any) -> FitState:
    return _each(start, g, p, q)


@jax.jit
def _advance(g: Any, p: Any, q: Any, state: Any, numbers: FitNumbers, limit: Any) -> FitState:
    return _each(lambda *x: advance(x[0], x[1], x[2], x[3], numbers, limit), g, p, q, state)


@jax.jit
def _finish(g: Any, p: Any, q: Any, state: Any) -> Any:
    return _each(finish, g, p, q, state)


def _check(g: jax.Array, p: SparseProjector | None, q: SparseProjector | None) -> None:
    stack = g.shape[:-2]
    fits = g.ndim in (2, 3) and g.shape[0] > 0
    for side, projector in ((-2, p), (-1, q)):
        if fits and projector is not None:
            fits = projector.d == g.shape[side] and projector.stack_shape == stack
    if not fits:
        shapes = [None if x is None else (*x.stack_shape, x.d, x.size) for x in (p, q)]
        raise ProjectorError(
            f"A fit takes a gradient (d_in, d_out) or a non-empty batch (k, d_in, d_out) and "
            f"projectors (d, s) with the same leading axes; given were a gradient of shape "
            f"{g.shape} and projectors of shapes {shapes[0]} and {shapes[1]}."
        )
