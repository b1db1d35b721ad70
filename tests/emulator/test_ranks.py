"""Ranks from ratios, energies and byte budgets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_jax.emulator import (
    Share,
    break_even_rank,
    rank_for_energy,
    rank_for_ratio,
    ranks_for_budget,
)
from emloc_jax.errors import RatioError

SIZES = st.integers(1, 300)


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0.01, 0.99))
def test_a_ratio_keeps_at_most_its_share(d_in, d_out, ratio):
    rank = rank_for_ratio(d_in, d_out, ratio)
    assert rank == 1 or rank * (d_in + d_out) <= ratio * d_in * d_out
    assert (rank + 1) * (d_in + d_out) > ratio * d_in * d_out * (1 - 1e-12)


@settings(deadline=None)
@given(SIZES, SIZES)
def test_break_even_is_the_last_rank_that_shrinks(d_in, d_out):
    rank = break_even_rank(d_in, d_out)
    assert rank * (d_in + d_out) < d_in * d_out <= (rank + 1) * (d_in + d_out)


def test_ranks_of_the_authors_configurations():
    cases = {(4096, 4096, 0.4): 819, (14336, 4096, 0.4): 1274, (6144, 4096, 0.4): 983}
    cases |= {(1024, 4096, 0.4): 327, (27648, 5120, 0.1): 432}
    for (d_in, d_out, ratio), rank in cases.items():
        assert rank_for_ratio(d_in, d_out, ratio) == rank


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan"), "half", None])
def test_ratios_outside_zero_and_one_are_refused(ratio):
    with pytest.raises(RatioError, match="strictly between 0 and 1"):
        rank_for_ratio(8, 8, ratio)


def test_energy_counts_stacked_kernels_together():
    squares = np.array([[8.0, 1.0, 1.0], [6.0, 4.0, 0.0]])  # together 14, 5, 1
    assert [rank_for_energy(squares, e) for e in (0.5, 0.7, 0.71, 0.95, 0.96)] == [1, 1, 2, 2, 3]
    with pytest.raises(RatioError, match="Energy 1.0"):
        rank_for_energy(squares, 1.0)


def make_shares(rng, count=3, size=5):
    shares = {}
    for i in range(count):
        gains = np.sort(rng.exponential(size=size))[::-1]
        shares[f"k{i}"] = Share(gains, bytes_per_rank=10, bytes_whole=10 * size, max_rank=size - 1)
    return shares


def total_error(shares, ranks):
    return sum(
        0.0 if rank is None else shares[path].gains[rank:].sum() for path, rank in ranks.items()
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12))
def test_budget_is_spent_as_well_as_by_brute_force(seed, ranks_in_all):
    """At equal costs the greedy choice among ranks is optimal, so no enumeration beats it."""
    shares = make_shares(np.random.default_rng(seed))
    chosen = ranks_for_budget(shares, 10 * ranks_in_all)
    numbers = {path: 5 if rank is None else rank for path, rank in chosen.items()}
    assert sum(numbers.values()) == ranks_in_all
    best = min(
        sum(share.gains[r:].sum() for share, r in zip(shares.values(), ranks, strict=True))
        for ranks in itertools.product(range(1, 6), repeat=3)
        if sum(ranks) == ranks_in_all
    )
    assert total_error(shares, numbers) == pytest.approx(best, rel=1e-9)


def test_budget_prefers_cheap_ranks_and_keeps_whole_what_it_can_afford():
    gains = np.array([4.0, 3.0, 2.0, 1.0])
    shares = {"wide": Share(gains, 100, 290, 2), "slim": Share(gains, 10, 29, 2)}
    assert ranks_for_budget(shares, 110) == {"wide": 1, "slim": 1}
    assert ranks_for_budget(shares, 129) == {"wide": 1, "slim": None}
    assert ranks_for_budget(shares, 10**6) == {"wide": None, "slim": None}


def test_budget_below_the_minimum_says_the_minimum():
    shares = make_shares(np.random.default_rng(0))
    with pytest.raises(RatioError, match="rank 1 everywhere takes 30 bytes"):
        ranks_for_budget(shares, 29)
