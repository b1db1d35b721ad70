"""The bound on the correction, against the equations in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.adapters import correct
from tests.adapters.cases import Moment, make_case, product, relative
from tests.adapters.reference import corrected_product


def run(case, **options):
    return correct(case.adapters, case.params, case.emulator, **options)["block/kernel"]


@pytest.mark.parametrize("bound", ["row", "kernel", "column"])
@pytest.mark.parametrize("limit", [0.1, 0.7, 3.0])
def test_against_float64(bound, limit):
    # b_scale puts the limits between "every row bounded" and "some rows bounded".
    case = make_case("scanned", ratio=2.0, b_scale=0.3)
    got = product(run(case, limit=limit, bound=bound))
    for layer in range(3):
        expected = corrected_product(
            case.lora_a[layer],
            case.lora_b[layer],
            case.kernel[layer],
            case.emulated[layer],
            scale=2.0,
            limit=limit,
            bound=bound,
        )
        assert relative(got[layer], expected) < 2e-5


def test_the_default_is_three_per_row():
    case = make_case(b_scale=0.05)
    np.testing.assert_array_equal(
        run(case).lora_b, run(case, limit=3.0, bound="row", moments=None).lora_b
    )


def test_limit_zero_returns_the_adapter_itself():
    case = make_case()
    adapter = run(case, limit=0)
    assert adapter is case.adapter and not adapter.corrected


def test_a_tiny_limit_leaves_the_product():
    case = make_case()
    assert relative(product(run(case, limit=1e-9)), product(case.adapter)) < 1e-6


@pytest.mark.parametrize("bound", ["row", "kernel", "column"])
@pytest.mark.parametrize("limit", [3.0, 1e30])
def test_an_untrained_adapter_stays_exactly_zero(bound, limit):
    adapter = run(make_case(b_scale=0.0), limit=limit, bound=bound)
    assert not np.any(np.asarray(adapter.lora_b))


def test_infinity_corrects_even_an_untrained_adapter():
    case = make_case(b_scale=0.0, ratio=2.0)
    u = np.linalg.svd(case.lora_a, full_matrices=False)[0]
    expected = u @ u.T @ (case.emulated - case.kernel)
    assert relative(product(run(case, limit=math.inf)), expected) < 1e-5


@pytest.mark.parametrize("limit", [0.5, 3.0, math.inf])
def test_an_emulator_equal_to_the_original_changes_nothing(limit):
    case = make_case("mixed axes, scanned")
    got = correct(case.adapters, case.params, case.params, limit=limit)["block/kernel"]
    assert relative(product(got), product(case.adapter)) < 1e-6


@pytest.mark.parametrize("limit", [3.0, math.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_directions_that_a_deficient_lora_a_does_not_read_stay_untouched(limit, weighted):
    case = make_case(rank=4)
    lora_a = case.lora_a.copy()
    lora_a[:, 3] = lora_a[:, 0] - 2 * lora_a[:, 1]  # rank 3
    deficient = {"block/kernel": case.adapter.replace(lora_a=jnp.asarray(lora_a, jnp.float32))}
    moments = None
    if weighted:
        inputs = np.random.default_rng(5).standard_normal((60, 12))
        moments = {"block/kernel": Moment(jnp.asarray(inputs.T @ inputs, jnp.float32))}
    got = correct(deficient, case.params, case.emulator, limit=limit, moments=moments)
    added = product(got["block/kernel"]) - product(deficient["block/kernel"])
    assert np.isfinite(added).all()
    unread = np.linalg.svd(lora_a)[0][:, 3:]
    assert np.abs(unread.T @ added).max() < 1e-5
    if limit == math.inf and not weighted:
        read = lora_a[:, :3].T  # and the identity holds on what is read
        expected = read @ (case.emulated - case.kernel)
        assert relative(read @ added, expected) < 1e-5


def test_a_lora_a_of_zeros_is_left_alone():
    case = make_case()
    zero = {"block/kernel": case.adapter.replace(lora_a=jnp.zeros((12, 4)))}
    got = correct(zero, case.params, case.emulator, limit=math.inf)["block/kernel"]
    np.testing.assert_array_equal(product(got), 0.0)


@pytest.mark.parametrize("bound", ["kernel", "column"])
def test_bounds_that_do_not_depend_on_the_basis(bound):
    """With equal singular values the basis is arbitrary; rotating it must not matter."""
    case = make_case(b_scale=0.2)
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((12, 4)))[0]
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    products = []
    for turn in (np.eye(4), rotation):
        adapter = case.adapter.replace(
            lora_a=jnp.asarray(basis @ turn, jnp.float32),
            lora_b=jnp.asarray(turn.T @ case.lora_b, jnp.float32),
        )
        got = correct({"block/kernel": adapter}, case.params, case.emulator, limit=1, bound=bound)
        products.append(product(got["block/kernel"]))
    assert relative(products[0], products[1]) < 1e-5


def test_low_precision_kernels_are_subtracted_in_float32():
    case = make_case(b_scale=0.3)
    low = {"block": {"kernel": case.params["block"]["kernel"].astype(jnp.bfloat16)}}
    rounded = np.asarray(low["block"]["kernel"].astype(jnp.float32), np.float64)
    got = correct(case.adapters, low, case.emulator, limit=1.0)["block/kernel"]
    assert got.lora_a.dtype == got.lora_b.dtype == jnp.float32
    expected = corrected_product(
        case.lora_a, case.lora_b, rounded, case.emulated, scale=1.0, limit=1.0
    )
    assert relative(product(got), expected) < 2e-5
