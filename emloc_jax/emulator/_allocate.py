"""Ranks of all kernels, from ratios, an energy threshold or a byte budget."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from emloc_jax.emulator._budget import Share, ranks_for_budget
from emloc_jax.emulator._factorization import Factorization
from emloc_jax.emulator._factorize_kernels import Weighting
from emloc_jax.emulator._moments import SecondMoment
from emloc_jax.emulator._ranks import break_even_rank, rank_for_energy, rank_for_ratio
from emloc_jax.emulator._selection import Reasons, apply_rules
from emloc_jax.kernels import KernelSpec

__all__ = ["allocate", "ranks_for_rules"]

Rules = float | Mapping[str, float] | Sequence[tuple[str, float]]


def ranks_for_rules(
    ratios: Rules, chosen: Mapping[str, KernelSpec], others: Reasons
) -> tuple[dict[str, int | None], dict[str, int]]:
    """Ranks by the ratio rule, before anything is factored: `(ranks, largest rank needed)`."""
    values = apply_rules("ratios", ratios, chosen, others)
    ranks = {
        path: rank_for_ratio(chosen[path].d_in, chosen[path].d_out, ratio)
        for path, ratio in values.items()
    }
    _note_unmatched(chosen, values, others)
    return dict(ranks), ranks


def allocate(
    factorizations: Mapping[str, Factorization],
    moments: Mapping[str, SecondMoment] | None,
    chosen: Mapping[str, KernelSpec],
    others: Reasons,
    *,
    energy: Rules | None,
    budget: int | None,
    weighting: Weighting,
) -> dict[str, int | None]:
    """Ranks by energy or budget, from the spectra; None where a kernel stays whole."""
    if energy is not None:
        values = apply_rules("energy", energy, chosen, others)
        _note_unmatched(chosen, values, others)
        ranks: dict[str, int | None] = {}
        for path, value in values.items():
            rank = rank_for_energy(np.asarray(factorizations[path].squares), value)
            most = break_even_rank(chosen[path].d_in, chosen[path].d_out)
            ranks[path] = rank if rank <= most else None
        return ranks
    assert budget is not None
    shares = {
        path: _share(
            factorizations[path], spec, None if moments is None else moments.get(path), weighting
        )
        for path, spec in chosen.items()
    }
    return ranks_for_budget(shares, budget)


def _note_unmatched(
    chosen: Mapping[str, KernelSpec], values: Mapping[str, float], others: Reasons
) -> None:
    for path in chosen:
        if path not in values:
            others[path] = ("kept", "no rule matches it")


def _share(
    factorization: Factorization,
    spec: KernelSpec,
    moment: SecondMoment | None,
    weighting: Weighting,
) -> Share:
    """The kernel's bid: two-sided squares per token estimate a loss; others count relatively.

    `||C^1/2 (K - K_E) G^1/2||^2 / count` is, up to a factor common to all kernels, the increase of
    the loss to second order under the Kronecker-factored Fisher matrix, so kernels compare as they
    are. Without gradients there is no common unit: each error counts relative to its norm.
    """
    squares = np.asarray(factorization.squares, np.float64)
    squares = squares.reshape(-1, squares.shape[-1])
    if weighting == "two_sided" and moment is not None:
        unit = np.asarray(moment.count, np.float64).reshape(-1, 1)
    else:
        unit = squares.sum(axis=1, keepdims=True)
    numbers = math.prod(spec.stack_shape) * np.dtype(spec.dtype).itemsize
    return Share(
        gains=(squares / np.where(unit > 0, unit, 1)).sum(axis=0),
        bytes_per_rank=numbers * (spec.d_in + spec.d_out),
        bytes_whole=numbers * spec.d_in * spec.d_out,
        max_rank=break_even_rank(spec.d_in, spec.d_out),
    )
