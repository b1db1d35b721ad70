import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.kernels import cache, identity_projector
from emloc_jax.offload._error import estimation_error
from tests.offload.gradients import dense_error, pair, power_law, stacked


@pytest.mark.parametrize("sides", ["both", "in", "out", "none", "cached"])
def test_error_is_its_definition(sides):
    g = power_law(24, 18)
    p, q = pair(24, 18, 12, 9, nnz=3)
    p, q = {
        "both": (p, q),
        "in": (p, None),
        "out": (None, q),
        "none": (None, None),
        "cached": (cache(p), cache(q)),
    }[sides]
    resolution = 1e-3 if sides == "none" else 1e-6
    expected = pytest.approx(dense_error(g, p, q), rel=1e-5, abs=resolution)
    assert float(estimation_error(g, p, q)) == expected


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e18])
def test_the_size_of_a_gradient_does_not_matter(scale):
    g = power_law(12, 10)
    p, q = pair(12, 10, 6, 5)
    error = float(estimation_error(jnp.asarray(g) * scale, p, q))
    assert error == pytest.approx(dense_error(g, p, q), rel=1e-5)


def test_layers_of_a_stack_have_their_own_errors():
    gs = np.stack([power_law(12, 10, seed=i) for i in range(2)])
    pairs = [pair(12, 10, 6, 5, seed=i) for i in range(2)]
    p, q = stacked(pairs[0][0], pairs[1][0]), stacked(pairs[0][1], pairs[1][1])
    expected = [dense_error(g, *one) for g, one in zip(gs, pairs, strict=True)]
    np.testing.assert_allclose(jax.jit(estimation_error)(gs, p, q), expected, rtol=1e-5)


def test_a_permutation_loses_nothing_and_zero_is_estimated_perfectly():
    swap = identity_projector(6, [1, 0, 3, 2, 5, 4])
    assert float(estimation_error(power_law(6, 6), swap, swap)) < 2e-3
    assert float(estimation_error(jnp.zeros((6, 6)), *pair(6, 6, 3, 3))) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_error_of_a_broken_gradient_is_nan(bad):
    g = power_law(6, 6)
    g[2, 3] = bad
    assert np.isnan(estimation_error(g, *pair(6, 6, 3, 3)))


def test_bf16_gradients_are_summed_in_fp32():
    g = jnp.asarray(power_law(24, 18), jnp.bfloat16)
    p, q = pair(24, 18, 12, 9)
    expected = dense_error(np.asarray(g, np.float64), p, q)
    assert float(estimation_error(g, p, q)) == pytest.approx(expected, rel=1e-5)
