"""When `lsp_adamw` fits, on what, and what becomes of the moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.offload._error import estimation_error
from emloc_jax.offload._fit_loop import fit_in_jit
from emloc_jax.offload._lsp_adamw import lsp_adamw
from emloc_jax.offload._transport import transport
from tests.offload.gradients import dense, power_law
from tests.offload.lsp_case import QUICK, spec, stepper

# Two kernels of equal shape share a loop; the third is stacked.
KERNELS = {
    "a": spec("a", (12,), (10,)),
    "b": spec("b", (12,), (10,)),
    "c": spec("c", (12,), (10,), stack=(2,)),
}
PARAMS = {"a": jnp.zeros((12, 10)), "b": jnp.zeros((12, 10)), "c": jnp.zeros((2, 12, 10))}


@functools.cache
def optimizer():
    tx = lsp_adamw(1e-2, kernels=KERNELS, where=".*", subspace=0.5, nnz=2, fit=QUICK, refit_every=2)
    compiled = stepper(tx)

    def step(g, state, params, *, refit_gradients=None, refit=True):
        """One program for all tests."""
        calibration = g if refit_gradients is None else refit_gradients
        return compiled(g, state, params, refit_gradients=calibration, refit=jnp.array(refit))

    return tx, step


def grads(seed, **changes):
    stack = np.stack([power_law(12, 10, seed=seed + 20), power_law(12, 10, seed=seed + 30)])
    whole = {"a": power_law(12, 10, seed=seed), "b": power_law(12, 10, seed=seed + 10), "c": stack}
    return {**whole, **changes}


def error(state, path, g):
    return estimation_error(jnp.asarray(g), *state.projectors[path])


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_the_first_step_is_fitted_before_it_is_taken():
    tx, step = optimizer()
    g, fresh = grads(0), tx.init(PARAMS)
    params, state = step(g, fresh, PARAMS)
    for path in KERNELS:
        assert np.all(error(fresh, path, g[path]) > 1.5)
        assert np.all(state.errors[path] < 1.0) and np.all(state.fitted[path])
        np.testing.assert_allclose(state.errors[path], error(state, path, g[path]), atol=1e-4)
    p, q = (dense(x) for x in state.projectors["a"])
    core = p.T @ np.asarray(g["a"], np.float64) @ q
    # Twice as long, since both sides are half as wide.
    np.testing.assert_allclose(params["a"], -2e-2 * p @ np.sign(core) @ q.T, atol=2e-5)
    # The same as fitting outside, for a member of a group and for a layer of a stack.
    for path, pick in (("b", lambda x: x), ("c", lambda x: x[1])):
        pair, one = jax.tree.map(pick, fresh.projectors[path]), jnp.asarray(pick(g[path]))
        alone, _, _ = jax.jit(fit_in_jit, static_argnums=3)(one, *pair, QUICK)
        np.testing.assert_allclose(pick(state.projectors[path][0].values), alone.values, atol=1e-4)


def test_a_refit_carries_the_moments_over():
    tx, step = optimizer()
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(2):
        params, state = step(grads(i), state, params)
    before, g = state, grads(50)  # gradients that the pairs do not suit
    params, state = step(g, state, params)
    for path in KERNELS:
        old, new = before.projectors[path], state.projectors[path]
        assert np.all(error(state, path, g[path]) < error(before, path, g[path]))
        same([x.indices for x in old], [x.indices for x in new])
        carried = transport(before.moments[path], old=old, new=new)
        p, q = (np.asarray(dense(x)) for x in new)
        core = np.swapaxes(p, -1, -2) @ np.asarray(g[path], np.float64) @ q
        moments = state.moments[path]
        np.testing.assert_allclose(moments.mu, 0.9 * carried.mu + 0.1 * core, atol=1e-5)
        np.testing.assert_allclose(moments.nu, 0.999 * carried.nu + 0.001 * core**2, atol=1e-6)
        assert int(moments.count) == 3


def test_between_checks_projectors_stay():
    tx, step = optimizer()
    params, state = step(grads(0), tx.init(PARAMS), PARAMS)
    _, after = step(grads(50), state, params)
    same(after.projectors, state.projectors)
    same(after.errors, state.errors)


def test_a_pair_that_saw_no_gradient_compresses_nothing_and_is_fitted_late():
    tx, step = optimizer()
    zero, g = np.zeros((12, 10), np.float32), grads(0)
    half = np.stack([zero, g["c"][1]])
    params, state = step({**g, "a": zero, "c": half}, tx.init(PARAMS), PARAMS)
    assert not state.fitted["a"] and np.isinf(state.errors["a"]) and not np.any(params["a"])
    np.testing.assert_array_equal(state.fitted["c"], [False, True])
    same(state.projectors["a"], tx.init(PARAMS).projectors["a"])
    params, after = step(g, state, params)  # no check is scheduled for step 1
    assert after.fitted["a"] and after.errors["a"] < 1.0 and np.any(params["a"])
    assert np.all(after.fitted["c"]) and np.all(after.errors["c"] < 1.0)
    same(after.projectors["b"], state.projectors["b"])
    p, q = (dense(x) for x in after.projectors["a"])
    np.testing.assert_allclose(after.moments["a"].mu, 0.1 * p.T @ g["a"] @ q, atol=1e-6)


def test_calibration_gradients_are_fitted_on_and_nothing_else():
    tx, step = optimizer()
    g, fresh = grads(0), grads(70)
    params, state = step(g, tx.init(PARAMS), PARAMS, refit_gradients=fresh)
    for path in KERNELS:
        np.testing.assert_allclose(state.errors[path], error(state, path, fresh[path]), atol=1e-4)
        p, q = (dense(x) for x in state.projectors[path])
        core = np.swapaxes(p, -1, -2) @ np.asarray(g[path], np.float64) @ q
        np.testing.assert_allclose(state.moments[path].mu, 0.1 * core, atol=1e-5)
    # They may be broken when no check looks at them, and spoil the step when one does.
    broken = {**fresh, "b": fresh["b"] * np.nan}
    _, unused = step(g, state, params, refit_gradients=broken)
    assert int(unused.count) == 2 and int(unused.skipped) == 0
    _, used = step(g, tx.init(PARAMS), PARAMS, refit_gradients=broken)
    assert int(used.count) == 0 and int(used.skipped) == 1


def test_a_check_can_be_put_off():
    tx, step = optimizer()
    fresh = tx.init(PARAMS)
    params, state = step(grads(0), fresh, PARAMS, refit=False)
    same(state.projectors, fresh.projectors)
    assert not np.any(params["a"]) and not state.fitted["a"]
    params, state = step(grads(1), state, params, refit=True)
    assert state.fitted["a"] and np.any(params["a"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_gradient_changes_nothing_but_a_counter(bad):
    tx, step = optimizer()
    params, state = step(grads(0), tx.init(PARAMS), PARAMS)
    g = grads(1)
    g["c"][1, 2, 3] = bad
    same_params, after = step(g, state, params)
    same(same_params, params)
    same(after._replace(skipped=state.skipped), state)
    assert int(after.skipped) == 1 and int(state.skipped) == 0
    _, later = step(grads(2), after, params)
    assert int(later.count) == 2 and int(later.skipped) == 1
