"""The bound on the correction, chosen by the loss of the corrected original model."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from emloc_jax._compiling import loop_options
from emloc_jax.adapters._adapter import Adapter
from emloc_jax.adapters._attach import attach
from emloc_jax.adapters._bound import Bound, apply_bound, check_limit
from emloc_jax.adapters._problem import HasSum, Problem, problems
from emloc_jax.adapters._whole import Trainable, split_whole
from emloc_jax.errors import NonFiniteError, NoTokensError

__all__ = [
    "CANDIDATES",
    "best_limit",
    "choose_limit",
    "limit_trials",
    "limits_to_try",
    "trial_loss",
]

CANDIDATES = (0.0, 0.1, 0.3, 0.5, 1.0, 3.0)

logger = logging.getLogger(__name__)


def choose_limit(
    adapters: Mapping[str, Trainable],
    params: Mapping[str, Any],
    emulator: Mapping[str, Any],
    loss: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
    batches: Iterable[Any],
    *,
    candidates: Sequence[float] = CANDIDATES,
    moments: Mapping[str, HasSum] | None = None,
    bound: Bound = "row",
) -> tuple[float, dict[float, float]]:
    """Measures every candidate limit on calibration batches and returns the best.

    The loss is that of the *original* model with the corrected adapters attached. Forward passes
    only, one compilation for all candidates (per batch shape), one pass over `batches`. The limit
    0, no correction, always takes part, so the choice is never worse than the uncorrected adapters
    on these batches.

    Args:
      adapters: as trained on the emulator.
      params: the original parameters.
      emulator: what the adapters were trained on.
      loss: `loss(params, batch) -> (sum, weight)`, with an intercepted apply; jitted here.
      batches: the calibration set.
      candidates: limits to try besides 0.
      moments: see `correct`.
      bound: see `correct`.

    Returns:
      The limit with the lowest mean loss (the smaller one on ties), and {limit: mean loss}.

    Raises:
      NoTokensError: no batch, or a total weight of 0.
      NonFiniteError: the uncorrected adapters have no finite loss.
      AdapterMismatchError, MomentShapeError, RatioError: see `correct`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 1))}
      >>> adapters = {"kernel": Adapter(jnp.ones((2, 1)), jnp.ones((1, 1)), alpha=1.0)}
      >>> def loss(params, x):
      ...     return (x @ params["kernel"].unbox()).sum(), x.shape[0]
      >>> choose_limit(adapters, params, params, loss, [jnp.ones((3, 2))], candidates=(1.0,))
      (0.0, {0.0: 4.0, 1.0: 4.0})
    """
    for limit in candidates:
        check_limit(limit, bound)
    work = problems(adapters, params, emulator, moments)
    limits = limits_to_try(candidates)
    _, whole = split_whole(adapters)
    trials: dict[float, dict[str, Trainable]] = {limit: {**whole} for limit in limits}
    for problem in work:
        for limit, adapter in limit_trials(problem, limits, bound).items():
            trials[limit][problem.path] = adapter
    params = jax.device_put(params)  # once, if they still lie on the host
    evaluate = trial_loss(loss)
    totals = {limit: np.zeros(2) for limit in limits}
    for batch in batches:
        measured = {limit: evaluate(params, trials[limit], batch) for limit in limits}
        for limit, pair in measured.items():
            totals[limit] += np.asarray([float(value) for value in pair])
    return best_limit(totals)


def trial_loss(loss: Callable[[Any, Any], tuple[jax.Array, jax.Array]]) -> Any:
    """A compiled `(params, adapters, batch) -> (sum, weight)` of the original with a trial."""
    return jax.jit(
        lambda params, trial, batch: loss(attach(params, trial), batch),
        compiler_options=loop_options(),
    )


def limits_to_try(candidates: Sequence[float]) -> list[float]:
    """The candidates in order, with 0 among them."""
    return sorted({0.0, *map(float, candidates)})


def limit_trials(problem: Problem, limits: Sequence[float], bound: Bound) -> dict[float, Adapter]:
    """One kernel's adapter for every limit; equal in structure, so that they share a compilation.

    Args:
      problem: of the kernel.
      limits: from `limits_to_try`.
      bound: see `correct`.
    """
    terms = problem.terms()
    return {
        limit: problem.adapter.with_matrices(terms.basis, apply_bound(terms, limit, bound=bound))
        if limit > 0
        else problem.adapter
        for limit in limits
    }


def best_limit(totals: Mapping[float, np.ndarray]) -> tuple[float, dict[float, float]]:
    """The choice from the loss and weight sums of every limit; see `choose_limit`."""
    weight = totals[0.0][1]
    if not weight > 0:
        raise NoTokensError(
            "The limit cannot be chosen: the calibration batches are empty or every token has "
            "weight 0. Pass batches with completion tokens, or give a number as the limit."
        )
    table = {limit: float(total / weight) for limit, (total, weight) in totals.items()}
    if not math.isfinite(table[0.0]):
        raise NonFiniteError(
            f"The original model with the uncorrected adapters has loss {table[0.0]} on the "
            "calibration batches. Check the adapters and the data."
        )
    finite = {limit: value for limit, value in table.items() if math.isfinite(value)}
    best = min(finite, key=lambda limit: (finite[limit], limit))
    logger.info("limit %g chosen: loss %.4f against %.4f", best, table[best], table[0.0])
    return best, table
