"""Compression: from a model and its second moments to an emulator and a report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from emloc_jax.emulator._allocate import allocate, ranks_for_rules
from emloc_jax.emulator._entries import error_squares, kernel_report
from emloc_jax.emulator._factorization import Factorization
from emloc_jax.emulator._factorize_kernels import (
    Weighting,
    choose_weighting,
    factorize_kernels,
    kernel_matrix,
)
from emloc_jax.emulator._moments import SecondMoment
from emloc_jax.emulator._report import CompressionReport, KernelReport
from emloc_jax.emulator._selection import Reasons, candidates
from emloc_jax.emulator._truncate import truncate
from emloc_jax.errors import MomentShapeError, RatioError
from emloc_jax.kernels import KernelSpec, get_leaf, peel

__all__ = ["compress"]

Rules = float | Mapping[str, float] | Sequence[tuple[str, float]]


def compress(
    params: Mapping[str, Any],
    moments: Mapping[str, SecondMoment] | None,
    *,
    kernels: Mapping[str, KernelSpec],
    ratios: Rules | None = None,
    energy: Rules | None = None,
    budget: int | None = None,
    skip: str | Sequence[str] = (),
    weighting: Weighting | None = None,
    damping: float | None = None,
    include_tied: bool = False,
    allow_materialize: bool = False,
    factorizations: Mapping[str, Factorization] | None = None,
    on_kernel: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], CompressionReport]:
    """Replaces kernels by their best low-rank approximations on the calibration data.

    Ranks come from exactly one of `ratios`, `energy` and `budget`. A kernel that would not shrink
    stays whole, as do tied embeddings, kernels without a handler, kernels on the skip list, and
    kernels that no rule matches; the report says which and why. A stacked kernel (`nn.scan`) has
    one rank for all its layers.

    Args:
      params: parameters of the original model; not changed.
      moments: from `calibrate`; None for `weighting="plain"`.
      kernels: all kernels of the model, from `find_kernels`.
      ratios: kept share of parameters, one number or ordered `(regex, ratio)` rules; rank is
        `floor(ratio * d_in * d_out / (d_in + d_out))`.
      energy: kept share of each kernel's squared weighted norm, one number or rules.
      budget: bytes for all candidate kernels together (skipped and kept ones not counted), shared
        out by their spectra: largest error reduction per byte first. Errors are taken relative to
        each kernel's norm, or as predicted loss with `weighting="two_sided"`.
      skip: expressions for kernels to leave whole.
      weighting: `two_sided`, `one_sided` or `plain`; by default the strongest that `moments` allow.
      damping: see `factorize`.
      include_tied: let tied embeddings be compressed, too.
      allow_materialize: let kernels without a handler be compressed; they are multiplied out at
        every call.
      factorizations: from `factorize_kernels`, to try another ratio without factoring again.
      on_kernel: called with each path when it is factored, for progress bars.

    Returns:
      The emulator's parameters, with `LowRankKernel` boxes, and a `CompressionReport`.

    Raises:
      RatioError: none or several of `ratios`, `energy`, `budget`; one out of range; or a budget
        too small (the message says the least possible).
      UnmatchedRuleError: a rule matches nothing, or only kernels that are not candidates.
      MomentShapeError: a kernel has no second moment, or one of another shape.
      NonFiniteError: a kernel or a moment holds NaN or infinity.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from emloc_jax.emulator import calibrate
      >>> from emloc_jax.kernels import find_kernels
      >>> model, x = nn.Dense(8), jax.random.normal(jax.random.key(0), (32, 8))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> kernels = find_kernels(model.apply, params, x)
      >>> moments = calibrate(model.apply, params, [x], kernels=kernels)
      >>> emulator, report = compress(params, moments, kernels=kernels, ratios=0.5)
      >>> emulator["kernel"].left.shape, report["kernel"].ratio
      ((8, 2), 0.5)
    """
    given = [name for name, v in _options(ratios, energy, budget).items() if v is not None]
    if len(given) != 1:
        raise RatioError(
            "Pass exactly one of `ratios`, `energy` and `budget`; got "
            f"{' and '.join(given) or 'none'}."
        )
    chosen, others = candidates(
        kernels, skip=skip, include_tied=include_tied, allow_materialize=allow_materialize
    )
    ranks: dict[str, int | None] = {}
    limits = None
    if ratios is not None:
        ranks, limits = ranks_for_rules(ratios, chosen, others)
        chosen = {path: chosen[path] for path in ranks}
    if factorizations is not None:
        used = _weighting_of(factorizations, chosen, weighting)
    else:
        used = choose_weighting(weighting, moments)
        factorizations = factorize_kernels(
            params,
            moments,
            kernels=chosen,
            weighting=used,
            damping=damping,
            max_ranks=limits,
            on_kernel=on_kernel,
        )
    if ratios is None:
        ranks = allocate(
            factorizations,
            moments,
            chosen,
            others,
            energy=energy,
            budget=budget,
            weighting=used,
        )
    emulator = truncate(params, factorizations, ranks, kernels=kernels)
    report = CompressionReport(
        tuple(
            _entry(spec, params, emulator, moments, factorizations, ranks, others, used)
            for spec in kernels.values()
        ),
        used,
    )
    return emulator, report


def _weighting_of(
    factorizations: Mapping[str, Factorization],
    chosen: Mapping[str, KernelSpec],
    asked: Weighting | None,
) -> Any:
    """The weighting that given factorizations were made with."""
    for path in chosen:
        if path not in factorizations:
            raise MomentShapeError(
                f"Kernel '{path}' is not among the {len(factorizations)} factorizations given. "
                "Factor it with `factorize_kernels`, or skip it."
            )
        found = factorizations[path].weighting
        if asked is not None and asked != found:
            raise ValueError(f"weighting='{asked}', but '{path}' was factored {found}.")
    return next((factorizations[path].weighting for path in chosen), asked or "plain")


def _options(ratios: Any, energy: Any, budget: Any) -> dict[str, Any]:
    return {"ratios": ratios, "energy": energy, "budget": budget}


def _entry(
    spec: KernelSpec,
    params: Mapping[str, Any],
    emulator: Mapping[str, Any],
    moments: Mapping[str, SecondMoment] | None,
    factorizations: Mapping[str, Factorization],
    ranks: Mapping[str, int | None],
    others: Reasons,
    weighting: Weighting,
) -> KernelReport:
    rank = ranks.get(spec.path)
    if rank is None:
        return kernel_report(spec, None, others=others)
    moment = None if weighting == "plain" or moments is None else moments[spec.path].sum
    arrays, structure = jax.tree.flatten(moment)
    kernel, box = kernel_matrix(params, spec), get_leaf(emulator, spec.path)
    stack = spec.stack_shape
    left = peel(box.left).reshape(*stack, spec.d_in, rank)
    right = peel(box.right).reshape(*stack, rank, spec.d_out)
    errors = [
        error_squares(
            kernel[layer],
            left[layer],
            right[layer],
            structure.unflatten([a[layer] for a in arrays]),
        )
        for layer in np.ndindex(stack)
    ]
    squares = np.asarray(factorizations[spec.path].squares)
    return kernel_report(spec, rank, squares, jax.device_get(errors))
