"""Factorizations against the float64 optimum, for both weightings and both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.emulator import factorize

from .problems import MAX_RANK, REGIMES, SHAPES, make_problem

DAMPING = 1e-3
RANKS = (3, 10, MAX_RANK)


def factored(problem, weighting, **kwargs):
    moment, gradient = problem.moments()
    if weighting == "one_sided":
        gradient = None
    return factorize(problem.kernel, moment, gradient, max_rank=MAX_RANK, **kwargs)


def product(factorization, rank):
    left, right = factorization.truncate(rank)
    return np.float64(left) @ np.float64(right)


@pytest.mark.parametrize("weighting", ["one_sided", "two_sided"])
@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
@pytest.mark.parametrize("regime", REGIMES)
def test_error_is_within_a_thousandth_of_the_optimum(regime, shape, weighting):
    problem = make_problem(regime, shape)
    damping = None if weighting == "one_sided" else DAMPING
    spectrum = problem.spectrum(damping)
    factorization = factored(problem, weighting)
    for rank in RANKS:
        optimum = np.linalg.norm(spectrum[rank:])
        error = problem.error(product(factorization, rank), damping)
        # Below 1e-6 of the norm there is only the rounding of fp32 factors.
        assert error <= 1.001 * optimum + 2e-6 * np.linalg.norm(spectrum)


@pytest.mark.parametrize("weighting", ["one_sided", "two_sided"])
@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
def test_squares_are_the_squared_singular_values(shape, weighting):
    problem = make_problem("well_conditioned", shape)
    factorization = factored(problem, weighting)
    want = problem.spectrum(None if weighting == "one_sided" else DAMPING)[: min(shape)] ** 2
    np.testing.assert_allclose(factorization.squares, want, rtol=2e-4)
    tails = np.sqrt(np.append(np.cumsum(want[::-1])[::-1], 0) / want.sum())
    np.testing.assert_allclose(factorization.relative_errors(), tails, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
def test_no_other_kernel_of_that_rank_is_better(shape):
    problem, rng = make_problem("fast_decay", shape), np.random.default_rng(1)
    left, right = map(np.float64, factored(problem, "one_sided").truncate(5))
    best = problem.error(left @ right)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            other_left = left + size * rng.normal(size=left.shape) * np.abs(left).mean()
            other_right = right + size * rng.normal(size=right.shape) * np.abs(right).mean()
            assert problem.error(other_left @ other_right) > best * (1 - 1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
def test_plain_is_the_truncated_svd(shape):
    problem = make_problem("well_conditioned", shape)
    factorization = factorize(problem.kernel, max_rank=MAX_RANK)
    u, s, vt = np.linalg.svd(np.float64(problem.kernel), full_matrices=False)
    np.testing.assert_allclose(product(factorization, 7), u[:, :7] * s[:7] @ vt[:7], atol=1e-5)
    np.testing.assert_allclose(factorization.squares, s**2, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["one_sided", "two_sided"])
@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
def test_full_rank_gives_the_kernel_back(shape, weighting):
    problem = make_problem("well_conditioned", shape)
    moment, gradient = problem.moments()
    gradient = gradient if weighting == "two_sided" else None
    factorization = factorize(problem.kernel, moment, gradient, max_rank=min(shape))
    np.testing.assert_allclose(product(factorization, min(shape)), problem.kernel, atol=1e-5)


def test_identity_gradient_moment_gives_the_one_sided_kernel():
    problem = make_problem("well_conditioned", SHAPES[0])
    moment, _ = problem.moments()
    one = factored(problem, "one_sided", damping=DAMPING)
    eye = jnp.eye(SHAPES[0][1])
    two = factorize(problem.kernel, moment, eye, max_rank=MAX_RANK, damping=DAMPING)
    np.testing.assert_allclose(product(two, 9), product(one, 9), atol=1e-5)


def test_scaling_the_moments_changes_only_the_squares():
    problem = make_problem("fast_decay", SHAPES[0])
    moment, gradient = problem.moments()
    one = factorize(problem.kernel, moment, gradient, max_rank=MAX_RANK)
    two = factorize(problem.kernel, moment * 2.0**40, gradient * 2.0**-30, max_rank=MAX_RANK)
    np.testing.assert_allclose(product(two, 9), product(one, 9), atol=1e-6)
    np.testing.assert_allclose(two.squares, one.squares * 2.0**10, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["one_sided", "two_sided"])
def test_stacked_kernels_are_factored_one_by_one(weighting):
    problems = [make_problem("outlier_heavy", SHAPES[1], seed) for seed in range(2)]
    kernels = np.stack([p.kernel for p in problems])[:, None]
    pairs = [p.moments() for p in problems]
    moments, gradients = (np.stack(m)[:, None] for m in zip(*pairs, strict=True))
    gradients = gradients if weighting == "two_sided" else None
    stacked = factorize(kernels, moments, gradients, max_rank=MAX_RANK)
    assert stacked.left.shape == (2, 1, 32, MAX_RANK) and stacked.squares.shape == (2, 1, 32)
    for i, problem in enumerate(problems):
        alone = factored(problem, weighting)
        one = jax.tree.map(lambda a, i=i: a[i, 0], stacked)
        np.testing.assert_allclose(product(one, 9), product(alone, 9), atol=1e-5)


def test_rows_of_right_have_unit_norm_and_survive_bf16():
    problem = make_problem("outlier_heavy", SHAPES[0])
    left, right = factored(problem, "two_sided").truncate(MAX_RANK)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), 1, rtol=1e-5)
    spectrum = problem.spectrum(DAMPING)
    coarse = [np.float64(f.astype(jnp.bfloat16)) for f in (left, right)]
    error = problem.error(coarse[0] @ coarse[1], DAMPING) / np.linalg.norm(spectrum)
    assert error < np.linalg.norm(spectrum[MAX_RANK:]) / np.linalg.norm(spectrum) + 2**-8


def test_float64_is_used_when_jax_allows_it():
    problem = make_problem("fast_decay", SHAPES[0])
    kernel, inputs = np.float64(problem.kernel), np.float64(problem.inputs)
    with jax.enable_x64(True):
        factorization = factorize(kernel, inputs.T @ inputs, max_rank=28, damping=1e-14)
        assert factorization.left.dtype == jnp.float64
        error = problem.error(product(factorization, 28))
    assert error == pytest.approx(np.linalg.norm(problem.spectrum()[28:]), rel=1e-6)


def test_gradient_moment_alone_is_refused():
    problem = make_problem("well_conditioned", SHAPES[0])
    with pytest.raises(ValueError, match="pass both"):
        factorize(problem.kernel, None, problem.moments()[1])


def test_truncation_outside_the_kept_ranks_is_refused():
    factorization = factorize(np.eye(8, dtype=np.float32))
    assert factorization.max_rank == 3  # the break-even rank of 8 x 8
    with pytest.raises(ValueError, match=r"1\.\.3"):
        factorization.truncate(4)
