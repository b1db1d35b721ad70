"""Degenerate kernels and moments: where a textbook route divides by nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.emulator import factorize
from emloc_jax.emulator._row_basis import through_row_basis

from .problems import MAX_RANK, SHAPES, make_problem


def basis_product(kernel):
    eye = jnp.eye(len(kernel))
    core, basis = through_row_basis(
        jnp.asarray(kernel), lambda core, times_basis: (core, times_basis(eye))
    )
    return np.float64(core) @ np.float64(basis), np.float64(basis)


@pytest.mark.parametrize("kind", ["usual", "zero row", "equal rows", "nearly equal rows"])
def test_row_basis_of_any_kernel(kind):
    kernel = make_problem("well_conditioned", SHAPES[1]).kernel.copy()
    if kind == "zero row":
        kernel[3] = 0
    if kind == "equal rows":
        kernel[3] = kernel[4]
    if kind == "nearly equal rows":
        kernel[3] = kernel[4] * (1 + 1e-5 * np.sin(np.arange(48, dtype=np.float32)))
    product, basis = basis_product(kernel)
    np.testing.assert_allclose(product, kernel, atol=2e-6)
    np.testing.assert_allclose(basis @ basis.T, np.eye(32), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
@pytest.mark.parametrize("weighting", ["one_sided", "two_sided"])
def test_kernel_of_low_rank_is_found_exactly(shape, weighting):
    rng = np.random.default_rng(0)
    problem = make_problem("well_conditioned", shape)
    thin = rng.normal(size=(shape[0], 4)) @ rng.normal(size=(4, shape[1]))
    moment, gradient = problem.moments()
    gradient = gradient if weighting == "two_sided" else None
    kernel = np.float32(thin)
    left, right = factorize(kernel, moment, gradient, max_rank=MAX_RANK).truncate(6)
    np.testing.assert_allclose(np.float64(left) @ np.float64(right), thin, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
def test_surplus_ranks_serve_the_kernel_off_the_data(shape):
    """With 6 tokens, ranks beyond 6 are free; they should lower the plain error of the kernel."""
    problem = make_problem("rank_deficient", shape)
    few = np.float64(problem.inputs[:6])
    moment = (few.T @ few).astype(np.float32)
    left, right = factorize(problem.kernel, moment, max_rank=MAX_RANK).truncate(16)
    gap = np.float64(problem.kernel) - np.float64(left) @ np.float64(right)
    assert np.linalg.norm(few @ gap) < 1e-5 * np.linalg.norm(few @ np.float64(problem.kernel))

    # The float64 solution with a vanishing ridge, by the textbook route.
    ridge = few.T @ few + 1e-9 * np.diag(np.diag(few.T @ few))
    values, vectors = np.linalg.eigh(ridge)
    root = np.sqrt(values)[:, None] * vectors.T
    _, _, rows = np.linalg.svd(root @ np.float64(problem.kernel), full_matrices=False)
    ideal = np.float64(problem.kernel) @ (np.eye(shape[1]) - rows[:16].T @ rows[:16])
    assert np.linalg.norm(gap) < 1.02 * np.linalg.norm(ideal)


def test_features_that_never_fire_do_no_harm():
    problem = make_problem("well_conditioned", SHAPES[0])
    inputs = problem.inputs.copy()
    inputs[:, :10] = 0
    factorization = factorize(problem.kernel, inputs.T @ inputs, max_rank=MAX_RANK)
    left, right = map(np.float64, factorization.truncate(MAX_RANK))
    gap = np.float64(problem.kernel) - left @ right
    optimum = np.linalg.svd(np.float64(inputs) @ np.float64(problem.kernel), compute_uv=False)
    assert np.linalg.norm(inputs @ gap) <= 1.001 * np.linalg.norm(optimum[MAX_RANK:])


@pytest.mark.parametrize("damping", [1e-7, 1e-3])
def test_two_sided_root_by_cholesky_and_by_eigh_agree_with_the_optimum(damping):
    """Small damping takes `eigh`, large damping Cholesky; singular moments on both sides."""
    problem = make_problem("rank_deficient", SHAPES[0])
    moment, gradient = problem.moments()
    factorization = factorize(problem.kernel, moment, gradient, damping=damping, max_rank=MAX_RANK)
    left, right = map(np.float64, factorization.truncate(8))
    spectrum = problem.spectrum(damping)
    assert problem.error(left @ right, damping) <= 1.001 * np.linalg.norm(spectrum[8:])
