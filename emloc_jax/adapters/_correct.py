"""The LoRA correction: from the emulator's adapter to the original model's."""

import logging
from collections.abc import Mapping
from typing import Any

from emloc_jax.adapters._adapter import Adapter
from emloc_jax.adapters._bound import Bound, apply_bound, check_limit
from emloc_jax.adapters._problem import HasSum, Problem, problems
from emloc_jax.adapters._whole import Trainable

__all__ = ["correct", "correct_kernel"]

logger = logging.getLogger(__name__)


def correct(
    adapters: Mapping[str, Trainable],
    params: Mapping[str, Any],
    emulator: Mapping[str, Any],
    *,
    limit: float = 3.0,
    moments: Mapping[str, HasSum] | None = None,
    bound: Bound = "row",
) -> dict[str, Trainable]:
    """Subtracts the emulator's error inside the subspace that each adapter reads.

    Algorithm 1 of EMLoC (arXiv 2506.12015), for any scale (the authors' code assumes scale 1).
    With `lora_a = U S Vᵀ` and `Delta = Uᵀ (K - K_E) / scale`, the corrected adapter is

        lora_a = U,    lora_b = S Vᵀ lora_b - g · Delta

    with `g` from `bound_gain`. Where `g = 1`, original plus corrected adapter equals emulator plus
    trained adapter for every input in span(lora_a). Float32, without biases, aware of alpha;
    compiled once per kernel shape; works on one kernel (one layer of a stack) at a time. What was
    trained whole comes back as it is: emulator and original have the same value there.

    Args:
      adapters: as trained on the emulator.
      params: the original parameters; kernels are arrays of any float dtype.
      emulator: kernels are `LowRankKernel`, or arrays where a kernel was kept whole; a kernel that
        equals its original leaves the adapter's product as it is.
      limit: how large the correction may be against what was learned; the paper uses 3. With 0 the
        adapters come back unchanged; `math.inf` corrects in full, even an untrained adapter.
      moments: {path: second moment}; if given, the mismatch on the calibration inputs is minimised
        instead of the one on span(lora_a).
      bound: what the limit holds for: each 'row' (the paper), the 'kernel', or each 'column'.

    Returns:
      New adapters of the same shapes and scale, marked `corrected` (unless `limit` is 0), in the
      order of `adapters`.

    Raises:
      AdapterMismatchError: corrected already, or paths or shapes differ.
      MomentShapeError: a second moment is missing or has another shape.
      NonFiniteError: an input holds a NaN or an infinity.
      RatioError: `limit` or `bound` is impossible.

    Example:
      >>> import math
      >>> import jax.numpy as jnp
      >>> from emloc_jax.adapters import merge
      >>> from emloc_jax.kernels import LowRankKernel
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> emulator = {"kernel": LowRankKernel(jnp.ones((2, 1)), jnp.array([[2.0, 3.0]]))}
      >>> reads_first_input = jnp.array([[1.0], [0.0]])
      >>> adapters = {"kernel": Adapter(reads_first_input, jnp.array([[0.5, 0.5]]), alpha=2.0)}
      >>> corrected = correct(adapters, params, emulator, limit=math.inf)
      >>> merge(params, corrected)["kernel"].tolist()  # first row: emulator plus adapter
      [[3.0, 4.0], [3.0, 4.0]]
    """
    check_limit(limit, bound)
    work = problems(adapters, params, emulator, moments)
    if limit == 0:
        return dict(adapters)
    logger.info("correcting %d adapters with limit %g per %s", len(work), limit, bound)
    corrected = {problem.path: correct_kernel(problem, limit, bound) for problem in work}
    return {path: corrected.get(path, adapter) for path, adapter in adapters.items()}


def correct_kernel(problem: Problem, limit: float, bound: Bound) -> Adapter:
    """The corrected adapter of one kernel, or of a stack; see `correct`."""
    if limit == 0:
        return problem.adapter
    terms = problem.terms()
    return problem.adapter.with_matrices(
        terms.basis, apply_bound(terms, float(limit), bound=bound), corrected=True
    )
