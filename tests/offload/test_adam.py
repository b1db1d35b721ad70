import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emloc_jax.errors import ConfigError
from emloc_jax.offload._adam import (
    AdamOptions,
    adam_direction,
    all_finite,
    checked_direction,
    init_moments,
)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 5), (), (0,)])
def test_directions_and_moments_are_those_of_optax(shape):
    options = AdamOptions(b1=0.8, b2=0.95, eps=1e-4)
    tx = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4)
    moments, state = init_moments(shape), tx.init(jnp.zeros(shape))
    rng = np.random.default_rng(0)
    for _ in range(5):
        g = jnp.asarray(rng.standard_normal(shape) * 1e-3, jnp.float32)
        direction, moments = adam_direction(g, moments, options)
        expected, state = tx.update(g, state)
        np.testing.assert_allclose(direction, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(moments.mu, state.mu, rtol=1e-6)
        np.testing.assert_allclose(moments.nu, state.nu, rtol=1e-6)
    assert int(moments.count) == 5 and direction.dtype == jnp.float32


def test_the_equations_in_float64():
    rng = np.random.default_rng(1)
    options, moments = AdamOptions(eps=1e-3), init_moments((4, 3))
    mu, nu = np.zeros((4, 3)), np.zeros((4, 3))
    for step in range(1, 8):
        g = rng.standard_normal((4, 3))
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
        expected = mu / (1 - 0.9**step) / (np.sqrt(nu / (1 - 0.999**step)) + 1e-3)
        direction, moments = adam_direction(jnp.asarray(g, jnp.float32), moments, options)
        np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-5)


def test_bf16_moments_are_computed_in_fp32():
    options, moments = AdamOptions(), init_moments((5,), jnp.bfloat16)
    g = jnp.asarray(np.random.default_rng(2).standard_normal(5), jnp.bfloat16)
    direction, moments = jax.jit(adam_direction, static_argnums=2)(g, moments, options)
    assert direction.dtype == jnp.float32
    assert moments.mu.dtype == moments.nu.dtype == jnp.bfloat16
    np.testing.assert_allclose(direction, np.sign(np.asarray(g, np.float32)), atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_gradient_leaves_everything_as_it_was(bad):
    options = AdamOptions()
    good = jnp.asarray([1.0, -2.0, 3.0])
    _, moments = adam_direction(good, init_moments((3,)), options)
    direction, after, finite = checked_direction(good.at[1].set(bad), moments, options)
    assert not finite and not np.any(direction)
    jax.tree.map(np.testing.assert_array_equal, after, moments)
    direction, after, finite = checked_direction(good, moments, options)
    assert finite and int(after.count) == 2
    np.testing.assert_array_equal(direction, adam_direction(good, moments, options)[0])


def test_all_finite_looks_at_every_leaf():
    assert all_finite({}) and all_finite({"a": jnp.ones(2), "b": [jnp.zeros((0,))]})
    assert not all_finite({"a": jnp.ones(2), "b": [jnp.array([0.0, np.inf])]})


@pytest.mark.parametrize("options", [{"b1": 1.0}, {"b2": -0.1}, {"eps": 0.0}, {"weight_decay": -1}])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(ConfigError, match="b1 and b2"):
        AdamOptions(**options)
