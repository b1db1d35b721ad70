"""The calibration-weighted correction is the least-squares solution on the inputs."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.adapters import correct
from emloc_jax.errors import MomentShapeError
from tests.adapters.cases import Moment, make_case, product, relative
from tests.adapters.reference import corrected_product


def inputs_of(stack, d_in, tokens=50, seed=7):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d_in, d_in)) * np.geomspace(3, 0.3, d_in)
    return rng.standard_normal((*stack, tokens, d_in)) @ mixing


def moment_of(inputs):
    return {"block/kernel": Moment(jnp.asarray(np.swapaxes(inputs, -1, -2) @ inputs, jnp.float32))}


@pytest.mark.parametrize(("name", "ratio"), [("dense", 0.5), ("mixed axes, scanned", 2.0)])
def test_unbounded_equals_least_squares(name, ratio):
    case = make_case(name, ratio=ratio)
    inputs = inputs_of(case.adapter.stack_shape, 12)
    got = correct(
        case.adapters, case.params, case.emulator, limit=math.inf, moments=moment_of(inputs)
    )["block/kernel"]
    layers = [()] if not case.adapter.stack_shape else [(0,), (1,)]
    for layer in layers:
        x, a = inputs[layer], case.lora_a[layer]
        wanted = x @ (case.emulated[layer] + ratio * a @ case.lora_b[layer] - case.kernel[layer])
        solution = np.linalg.lstsq(ratio * x @ a, wanted, rcond=None)[0]
        assert relative(product(got)[layer], ratio * a @ solution) < 1e-4


def test_bounded_against_float64():
    case = make_case(ratio=2.0, b_scale=0.3)
    inputs = inputs_of((), 12)
    moments = moment_of(inputs)
    got = correct(case.adapters, case.params, case.emulator, limit=0.7, moments=moments)
    expected = corrected_product(
        case.lora_a,
        case.lora_b,
        case.kernel,
        case.emulated,
        scale=2.0,
        limit=0.7,
        moment=inputs.T @ inputs,
    )
    assert relative(product(got["block/kernel"]), expected) < 1e-4


def test_white_inputs_give_the_plain_form():
    case = make_case(b_scale=0.3)
    moments = {"block/kernel": Moment(5.0 * jnp.eye(12))}
    weighted = correct(case.adapters, case.params, case.emulator, limit=1.0, moments=moments)
    plain = correct(case.adapters, case.params, case.emulator, limit=1.0)
    assert relative(product(weighted["block/kernel"]), product(plain["block/kernel"])) < 1e-5


@pytest.mark.parametrize("tokens", [3, 0])
def test_fewer_tokens_than_the_rank_stay_finite_and_fit_what_was_seen(tokens):
    case = make_case()
    inputs = inputs_of((), 12, tokens=tokens)
    got = correct(
        case.adapters, case.params, case.emulator, limit=math.inf, moments=moment_of(inputs)
    )["block/kernel"]
    added = product(got) - product(case.adapter)
    if tokens == 0:  # nothing was seen, so nothing can be matched
        assert np.abs(added).max() < 1e-5
        return
    before = np.linalg.norm(inputs @ (case.kernel - case.emulated))
    after = np.linalg.norm(inputs @ (case.kernel + added - case.emulated))
    assert after < 1e-2 * before
    # The surplus directions stay small instead of blowing up.
    assert np.linalg.norm(added) < 10 * np.linalg.norm(case.kernel - case.emulated)


def test_a_missing_or_misshapen_moment_is_refused():
    case = make_case()
    with pytest.raises(MomentShapeError, match="has none"):
        correct(case.adapters, case.params, case.emulator, moments={})
    with pytest.raises(MomentShapeError, match=r"\(10, 10\).*\(12, 12\)"):
        moments = {"block/kernel": Moment(jnp.eye(10))}
        correct(case.adapters, case.params, case.emulator, moments=moments)
