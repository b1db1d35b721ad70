"""Factorizations of the kernels of a parameter tree, each good for every rank."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.emulator._factorization import Factorization
from emloc_jax.emulator._factorize import factorize
from emloc_jax.emulator._moments import CompactMoment, SecondMoment, moment_arrays
from emloc_jax.errors import MomentShapeError, NonFiniteError, NoTokensError
from emloc_jax.kernels import KernelSpec, get_leaf, materialize, peel

__all__ = ["Weighting", "choose_weighting", "factorize_kernels", "kernel_matrix"]

Weighting = Literal["two_sided", "one_sided", "plain"]


def factorize_kernels(
    params: Mapping[str, Any],
    moments: Mapping[str, SecondMoment] | None,
    *,
    kernels: Mapping[str, KernelSpec],
    weighting: Weighting | None = None,
    damping: float | None = None,
    max_ranks: Mapping[str, int] | None = None,
    on_kernel: Callable[[str], None] | None = None,
) -> dict[str, Factorization]:
    """Factors each of `kernels` once; any ratio is then a truncation.

    Kernels of equal shapes share one compiled program. The result is about as large as the kernels
    in fp32, or as their part up to `max_ranks`.

    Args:
      params: parameters of the original model.
      moments: from `calibrate`, compact or full; not needed for `weighting="plain"`.
      kernels: which ones, from `find_kernels`.
      weighting: `two_sided` weighs by inputs and output gradients, `one_sided` by inputs (the
        paper), `plain` not at all. None takes the strongest that `moments` allow.
      damping: see `factorize`.
      max_ranks: largest rank that will be asked for, by path; by default the break-even rank.
      on_kernel: called with each path when it is done, for progress bars.

    Returns:
      `{path: Factorization}` in the order of `kernels`.

    Raises:
      MomentShapeError: a kernel has no second moment, or one of another shape.
      NoTokensError: a second moment is zero.
      NonFiniteError: a kernel or a moment holds NaN or infinity; the message names it.
    """
    weighting = choose_weighting(weighting, moments)
    for path, spec in kernels.items():
        _check_moment(path, spec, moments, weighting)
    result = {}
    for path, spec in kernels.items():
        moment = None if weighting == "plain" or moments is None else moments[path]
        factorization = factorize(
            kernel_matrix(params, spec),
            None if moment is None else moment.sum,
            moment.gradient if moment is not None and weighting == "two_sided" else None,
            damping=damping,
            max_rank=None if max_ranks is None else max_ranks.get(path),
        )
        _check_finite(path, factorization, params, spec, moment)
        result[path] = factorization
        if on_kernel is not None:
            on_kernel(path)
    return result


def choose_weighting(
    weighting: Weighting | None, moments: Mapping[str, SecondMoment] | None
) -> Weighting:
    """The weighting asked for, or the strongest one that `moments` allow."""
    if weighting is None:
        if not moments:
            return "plain"
        measured = all(moment.gradient is not None for moment in moments.values())
        return "two_sided" if measured else "one_sided"
    if weighting not in ("two_sided", "one_sided", "plain"):
        raise ValueError(f"weighting={weighting!r} is none of 'two_sided', 'one_sided', 'plain'.")
    return weighting


def kernel_matrix(params: Mapping[str, Any], spec: KernelSpec) -> jax.Array:
    """The kernel as fp32 (or float64) `(*stack, d_in, d_out)`."""
    array = jnp.asarray(peel(materialize(get_leaf(params, spec.path))))
    return spec.layout.matrix(array).astype(jnp.promote_types(array.dtype, jnp.float32))


def _check_moment(
    path: str,
    spec: KernelSpec,
    moments: Mapping[str, SecondMoment] | None,
    weighting: Weighting,
) -> None:
    if weighting == "plain":
        return
    if moments is None or path not in moments:
        raise MomentShapeError(
            f"Kernel '{path}' has no second moment, which weighting='{weighting}' needs. Calibrate "
            "it, skip it, or use weighting='plain'."
        )
    moment = moments[path]
    wanted = _shapes("sum", moment.sum, spec, spec.d_in, spec.d_out)
    if weighting == "two_sided":
        if moment.gradient is None:
            raise MomentShapeError(
                f"Kernel '{path}' has no gradient moment, which weighting='two_sided' needs. "
                "Calibrate with `gradients=True`, or use weighting='one_sided'."
            )
        wanted |= _shapes("gradient", moment.gradient, spec, spec.d_out, spec.d_in)
    arrays = moment_arrays(moment)
    for field, shape in wanted.items():
        found = arrays[field].shape
        if found != shape:
            raise MomentShapeError(
                f"The second moment of '{path}' has `{field}` of shape {found}, but its kernel "
                f"{spec.shape} with d_in={spec.d_in}, d_out={spec.d_out} needs {shape}. Was it "
                "calibrated on another model?"
            )


def _shapes(
    field: str, moment: jax.Array | CompactMoment, spec: KernelSpec, own: int, other: int
) -> dict[str, tuple[int, ...]]:
    """Shapes that the arrays of one side must have; `own` is the width of that side."""
    stack = spec.stack_shape
    if not isinstance(moment, CompactMoment):
        return {field: (*stack, own, own)}
    return {f"{field}.through": (*stack, other, other), f"{field}.diagonal": (*stack, own)}


def _check_finite(
    path: str,
    factorization: Factorization,
    params: Mapping[str, Any],
    spec: KernelSpec,
    moment: SecondMoment | None,
) -> None:
    """Explains a factorization that is not finite; `factorize` then gives NaN everywhere."""
    if np.isfinite(np.asarray(factorization.squares)).all():
        return
    arrays = {"kernel": kernel_matrix(params, spec)}
    if moment is not None:
        arrays |= moment_arrays(moment)
    for field, array in arrays.items():
        name = "gradient moment" if field.startswith("gradient") else "second moment"
        name = field if field in ("kernel", "count") else name
        if not jnp.isfinite(array).all():
            raise NonFiniteError(
                f"The {name} of '{path}' holds NaN or infinity. Check the checkpoint and the "
                "calibration data."
            )
        if field in ("kernel", "count") or field.endswith(".through"):
            continue
        diagonal = array if field.endswith(".diagonal") else jnp.diagonal(array, 0, -2, -1)
        if not diagonal.sum(-1).all():
            raise NoTokensError(
                f"The {name} of '{path}' is zero: nothing but zeros passed there in calibration. "
                "Calibrate on data that uses this kernel, or skip it."
            )
    raise NonFiniteError(
        f"Factoring '{path}' {spec.shape} gave NaN or infinity from finite inputs. Raise `damping`."
    )
