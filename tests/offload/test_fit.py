import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from emloc_jax.errors import ConfigError, NonFiniteError, ProjectorError
from emloc_jax.kernels import cache, make_projector, to_dense
from emloc_jax.offload._error import frobenius_norm
from emloc_jax.offload._fit import fit
from emloc_jax.offload._fit_gradient import objective_gradient
from emloc_jax.offload._fit_options import FitOptions
from tests.offload.gradients import dense, dense_error, pair, power_law, stacked


def torch_objective(g, p, q, beta):
    """Objective and dense gradients by autodiff of the definition, in float64."""
    g = torch.tensor(np.asarray(g, np.float64))
    matrices = [torch.tensor(dense(p, g.shape[0])), torch.tensor(dense(q, g.shape[1]))]
    for matrix in matrices:
        matrix.requires_grad_()
    a, b = matrices
    error = torch.linalg.norm(a @ a.T @ g @ b @ b.T - g) / torch.linalg.norm(g)
    norms = [torch.linalg.norm(m) / len(m) ** 0.5 for m in matrices]
    (error + beta * sum(norms)).backward()
    return error.item(), a.grad.numpy(), b.grad.numpy()


@pytest.mark.parametrize("sides", ["both", "in", "out"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_is_that_of_the_definition(sides, beta):
    g = power_law(20, 14)
    p, q = pair(20, 14, 10, 6, nnz=3, law="normal")
    p, q = (p if sides != "out" else None), (q if sides != "in" else None)
    error, grads = jax.jit(objective_gradient)(jnp.asarray(g), frobenius_norm(g), (p, q), beta)
    expected_error, *expected = torch_objective(g, p, q, beta)
    assert float(error) == pytest.approx(expected_error, rel=1e-5)
    for projector, grad, full in zip((p, q), grads, expected, strict=True):
        if projector is None:
            assert grad is None
        else:
            at = np.take_along_axis(full, np.asarray(projector.indices, np.int64), axis=1)
            np.testing.assert_allclose(grad, at, atol=1e-5 * np.abs(at).max())


def test_a_fit_learns_a_power_law_but_not_noise():
    """The reference's toy at a quarter of its size: from about 2.7 to about a half."""
    law = power_law(64, 64)
    noise = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    pairs = [pair(64, 64, 32, 32, nnz=4, seed=i) for i in range(2)]
    p, q = stacked(pairs[0][0], pairs[1][0]), stacked(pairs[0][1], pairs[1][1])
    options = FitOptions(threshold=0.0)
    new_p, new_q, report = fit(jnp.stack([law, noise]), p, q, options)
    np.testing.assert_array_equal(report.steps, 100)
    assert np.all((report.error_before > 2.2) & (report.error_before < 3.2))
    assert 0.3 < report.error_after[0] < 0.6 < report.error_after[1] < 0.95
    for i, g in enumerate((law, noise)):
        single = [new.replace(**{k: getattr(new, k)[i] for k in ("indices", "values", "slots")})
                  for new in (new_p, new_q)]  # fmt: skip
        assert report.error_after[i] == pytest.approx(dense_error(g, *single), rel=1e-4)
    # A batch is what its members are alone.
    alone, _, alone_report = fit(law, *pairs[0], options)
    np.testing.assert_allclose(alone.values, new_p.values[0], atol=1e-5)
    assert alone_report.error_after == pytest.approx(float(report.error_after[0]), rel=1e-5)


SMALL = power_law(16, 12)


def small_pair(**options):
    return pair(16, 12, 8, 6, **options)


def test_it_stops_at_the_threshold_and_a_good_pair_is_left_alone():
    p, q, report = fit(SMALL, *small_pair(), FitOptions(threshold=0.7))
    assert 0 < report.steps < 100 and 0.3 < report.error_after <= 0.7
    again_p, again_q, again = fit(SMALL, p, q, FitOptions(threshold=0.7))
    assert again.steps == 0 and again.error_after == again.error_before
    np.testing.assert_array_equal(again_p.values, p.values)
    np.testing.assert_array_equal(again_q.values, q.values)


def test_a_fit_begins_with_the_best_scale():
    g, start = SMALL.astype(np.float64), small_pair()
    left, right = (dense(x) for x in start)
    estimate = left @ left.T @ g @ right @ right.T
    cosine = np.sum(estimate * g) / (np.linalg.norm(estimate) * np.linalg.norm(g))
    best = np.sqrt(1 - cosine**2)  # of all multiples of the estimate
    p, q, report = fit(SMALL, *start, FitOptions(threshold=1.01 * best))
    assert report.steps == 0 and report.error_before > 1
    assert report.error_after == pytest.approx(best, rel=1e-5)
    assert dense_error(SMALL, p, q) == pytest.approx(best, rel=1e-5)
    one, _, _ = fit(SMALL, start[0], None, FitOptions(threshold=0.99))
    ratio = np.asarray(one.values) / np.asarray(start[0].values)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)


def test_positions_stay_and_a_cached_copy_is_refreshed():
    p, q = small_pair()
    plain, _, report = fit(SMALL, p, q, FitOptions(steps=20))
    cached, _, _ = fit(SMALL, cache(p), q, FitOptions(steps=20))
    np.testing.assert_array_equal(plain.indices, p.indices)
    np.testing.assert_allclose(cached.cached, to_dense(plain), atol=1e-6)
    assert report.error_after < report.error_before


def test_a_fit_that_does_not_help_returns_the_old_values():
    p, q, _ = fit(SMALL, *small_pair(), FitOptions(steps=300, decay_to=0.01, threshold=0.0))
    wild = FitOptions(steps=3, learning_rate=50.0, threshold=0.0)
    same_p, same_q, report = fit(SMALL, p, q, wild)
    np.testing.assert_array_equal(same_p.values, p.values)
    np.testing.assert_array_equal(same_q.values, q.values)
    assert report.error_after == report.error_before and report.steps == 3


def test_a_warm_start_continues_where_the_old_fit_ended():
    start = small_pair()
    p, q, first = fit(SMALL, *start, FitOptions(threshold=0.0, steps=60))
    moved = SMALL + 0.05 * np.random.default_rng(3).standard_normal(SMALL.shape)
    options = FitOptions(threshold=0.0, steps=10, learning_rate=0.02)
    _, _, warm = fit(jnp.asarray(moved), p, q, options)
    _, _, cold = fit(jnp.asarray(moved), *start, options)
    assert warm.error_before < 1.0 < cold.error_before
    assert warm.error_after < cold.error_after and first.steps == 60


def test_bf16_values_stay_bf16_and_the_report_is_about_them():
    p, q = small_pair(dtype=jnp.bfloat16)
    p, q, report = fit(SMALL, p, q, FitOptions(steps=40))
    assert p.values.dtype == q.values.dtype == jnp.bfloat16
    assert report.error_after == pytest.approx(dense_error(SMALL, p, q), rel=1e-4)
    assert report.error_after < 0.8


def test_one_side_alone_and_the_regulariser():
    p, q, report = fit(SMALL, None, small_pair()[1], FitOptions(threshold=0.0))
    assert p is None and report.error_after < report.error_before
    plain = fit(SMALL, *small_pair(), FitOptions(steps=40, threshold=0.0))
    heavy = fit(SMALL, *small_pair(), FitOptions(steps=40, threshold=0.0, beta=3.0))
    norms = [sum(float(jnp.linalg.norm(x.values)) for x in run[:2]) for run in (plain, heavy)]
    assert norms[1] < norms[0] and plain[2].error_after < heavy[2].error_after


def test_a_time_limit_stops_after_the_first_steps():
    _, _, report = fit(SMALL, *small_pair(), FitOptions(threshold=0.0, time_limit=1e-6))
    assert 0 < report.steps < 100 and report.error_after < report.error_before
    _, _, slow = fit(SMALL, *small_pair(), FitOptions(steps=15, threshold=0.0, time_limit=600.0))
    _, _, free = fit(SMALL, *small_pair(), FitOptions(steps=15, threshold=0.0))
    assert slow.steps == free.steps == 15
    assert slow.error_after == pytest.approx(float(free.error_after), rel=1e-5)


def test_a_gradient_of_zero_needs_no_fit():
    p, q = small_pair()
    new, _, report = fit(jnp.zeros((16, 12)), p, q)
    np.testing.assert_array_equal(new.values, p.values)
    assert report.steps == 0 and report.error_after == 0


def test_impossible_requests_are_refused():
    p, q = small_pair()
    broken = np.stack([SMALL, SMALL])
    broken[1, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"2 gradients; number 1 "):
        fit(jnp.asarray(broken), stacked(p, p), stacked(q, q))
    with pytest.raises(ProjectorError, match=r"\(16, 12\).*\(12, 6\) and \(16, 8\)"):
        fit(SMALL, q, p)
    with pytest.raises(ProjectorError, match="non-empty batch"):
        fit(jnp.zeros((0, 16, 12)), p, q)
    with pytest.raises(ProjectorError, match="leading axes"):
        fit(jnp.stack([SMALL]), p, make_projector(0, 12, 6, 2))
    for options in ({"steps": 0}, {"learning_rate": 0.0}, {"beta": -1.0}, {"decay_to": 2.0},
                    {"threshold": float("nan")}, {"time_limit": 0.0}):  # fmt: skip
        with pytest.raises(ConfigError, match="must be positive"):
            FitOptions(**options)
