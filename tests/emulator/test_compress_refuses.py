"""Requests that `compress` and its parts refuse, before any long work."""

import dataclasses

import jax.numpy as jnp
import pytest

from emloc_jax.emulator import calibrate, compress, factorize_kernels, truncate
from emloc_jax.errors import (
    MomentShapeError,
    NonFiniteError,
    NoTokensError,
    RatioError,
    UnmatchedRuleError,
)

from .towers import make_tower

PATH = "layers/q/kernel"


@pytest.fixture(scope="module")
def tower():
    model, params, kernels, x = make_tower(scanned=True)
    return params, kernels, calibrate(model.apply, params, [x], kernels=kernels)


@pytest.mark.parametrize(
    "options, found",
    [({}, "none"), ({"ratios": 0.5, "budget": 100}, "ratios and budget")],
)
def test_exactly_one_way_to_choose_ranks(tower, options, found):
    params, kernels, moments = tower
    with pytest.raises(RatioError, match=f"exactly one.*got {found}"):
        compress(params, moments, kernels=kernels, **options)


@pytest.mark.parametrize("ratio", [0, 1, 1.2, -1])
def test_ratios_out_of_range(tower, ratio):
    params, kernels, moments = tower
    for ratios in (ratio, {"layers/.*": ratio}):
        with pytest.raises(RatioError, match="strictly between 0 and 1"):
            compress(params, moments, kernels=kernels, ratios=ratios)
    with pytest.raises(RatioError, match="strictly between 0 and 1"):
        compress(params, moments, kernels=kernels, energy=ratio)


def test_rules_that_match_nothing(tower):
    params, kernels, moments = tower
    for options in ({"ratios": {"layer/.*": 0.5}}, {"ratios": 0.5, "skip": "layer/.*"}):
        with pytest.raises(UnmatchedRuleError, match="Nearest paths"):
            compress(params, moments, kernels=kernels, **options)
    with pytest.raises(UnmatchedRuleError, match="matches only kernels that are not compressed"):
        compress(params, moments, kernels=kernels, ratios={"layers/q": 0.5}, skip="layers/q")


def test_moments_that_are_missing_or_do_not_fit(tower):
    params, kernels, moments = tower
    with pytest.raises(MomentShapeError, match="has no second moment"):
        compress(params, None, kernels=kernels, ratios=0.5, weighting="one_sided")
    with pytest.raises(MomentShapeError, match="no gradient moment.*gradients=True"):
        compress(params, moments, kernels=kernels, ratios=0.5, weighting="two_sided")
    cut = {**moments, PATH: dataclasses.replace(moments[PATH], sum=moments[PATH].sum[:, 1:, 1:])}
    with pytest.raises(MomentShapeError, match=rf"{PATH}.*\(2, 5, 5\).*\(2, 6, 6\)"):
        compress(params, cut, kernels=kernels, ratios=0.5)
    with pytest.raises(ValueError, match="none of 'two_sided'"):
        compress(params, moments, kernels=kernels, ratios=0.5, weighting="three_sided")


def test_moments_that_are_zero_or_not_finite(tower):
    params, kernels, moments = tower
    zero = {**moments, PATH: dataclasses.replace(moments[PATH], sum=0 * moments[PATH].sum)}
    with pytest.raises(NoTokensError, match=f"second moment of '{PATH}' is zero"):
        compress(params, zero, kernels=kernels, ratios=0.5)
    bad = {**moments, PATH: dataclasses.replace(moments[PATH], sum=jnp.nan * moments[PATH].sum)}
    with pytest.raises(NonFiniteError, match=f"second moment of '{PATH}'"):
        compress(params, bad, kernels=kernels, ratios=0.5)


def test_kernels_that_are_not_finite(tower):
    params, kernels, moments = tower
    layers = {**params["layers"], "q": {**params["layers"]["q"]}}
    layers["q"]["kernel"] = layers["q"]["kernel"].at[1, 0, 0].set(jnp.inf)
    for weighting in ("plain", "one_sided"):
        with pytest.raises(NonFiniteError, match=f"kernel of '{PATH}'"):
            compress(
                {**params, "layers": layers},
                moments,
                kernels=kernels,
                ratios=0.5,
                weighting=weighting,
            )


def test_ranks_and_kernels_that_a_factorization_does_not_hold(tower):
    params, kernels, moments = tower
    full = factorize_kernels(params, moments, kernels={PATH: kernels[PATH]}, max_ranks={PATH: 2})
    with pytest.raises(RatioError, match=rf"Rank 3 of '{PATH}' is outside 1\.\.2"):
        truncate(params, full, {PATH: 3}, kernels=kernels)
    with pytest.raises(MomentShapeError, match="not among the 1 factorizations"):
        compress(params, moments, kernels=kernels, ratios=0.5, factorizations=full)
    with pytest.raises(ValueError, match="factored one_sided"):
        compress(
            params,
            moments,
            kernels=kernels,
            ratios={"layers/q": 0.5},
            factorizations=full,
            weighting="plain",
        )
