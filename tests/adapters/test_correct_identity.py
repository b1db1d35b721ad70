"""Original plus corrected adapter equals emulator plus trained adapter on span(lora_a)."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.adapters import Adapter, attach, correct, merge
from emloc_jax.kernels import LowRankKernel, intercept
from tests.adapters.cases import LAYOUTS, make_case, product, relative


def check_identity(case, tolerance=1e-5):
    corrected = correct(case.adapters, case.params, case.emulator, limit=math.inf)
    adapter = corrected["block/kernel"]
    assert adapter.corrected and adapter.scale == case.adapter.scale
    assert adapter.lora_a.shape == case.adapter.lora_a.shape
    assert adapter.lora_b.shape == case.adapter.lora_b.shape
    trained = case.adapter.scale * case.lora_a @ case.lora_b
    inputs = np.swapaxes(case.lora_a, -1, -2)  # rows that span what the adapter reads
    expected = inputs @ (case.emulated + trained)
    assert relative(inputs @ (case.kernel + product(adapter)), expected) < tolerance
    # Inputs that the adapter does not read still see the original kernel alone.
    unread = np.linalg.svd(case.lora_a)[0][..., case.adapter.rank :]
    assert np.abs(np.swapaxes(unread, -1, -2) @ product(adapter)).max(initial=0) < 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    check_identity(make_case(name, ratio=2.0))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_scale(ratio, rslora):
    check_identity(make_case(ratio=ratio, rslora=rslora))


def test_leaving_the_scale_out_would_break_it():
    case = make_case(ratio=4.0)
    wrong = case.adapter.replace(alpha=float(case.adapter.rank))  # as if scale were 1
    got = correct({"block/kernel": wrong}, case.params, case.emulator, limit=math.inf)
    adapter = got["block/kernel"].replace(alpha=case.adapter.alpha)
    inputs = case.lora_a.T
    expected = inputs @ (case.emulated + 4.0 * case.lora_a @ case.lora_b)
    assert relative(inputs @ (case.kernel + product(adapter)), expected) > 0.1


def test_an_emulator_given_as_arrays():
    check_identity(make_case("mixed axes, scanned", whole=True))


def test_rank_above_d_in_keeps_rank_and_scale():
    check_identity(make_case("wide", rank=11, ratio=2.0))


def test_no_further_compilation_for_another_kernel_or_limit():
    from emloc_jax.adapters._terms import _one_kernel as correction_terms

    for seed, limit, ratio in [(0, 3.0, 1.0), (1, 0.5, 2.0), (2, math.inf, 4.0)]:
        case = make_case(seed=seed, ratio=ratio)
        correct(case.adapters, case.params, case.emulator, limit=limit)
        if seed == 0:
            compiled = correction_terms._cache_size()
    assert correction_terms._cache_size() == compiled


def test_through_a_model_with_large_biases():
    """Outputs of the linen modules, biases on: the bias must cancel exactly."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    model = nn.DenseGeneral((2, 5))
    bias = 100 * normal(2, 5)
    params = {"kernel": normal(12, 2, 5), "bias": bias}
    box = LowRankKernel(normal(12, 3), normal(3, 2, 5), layout=make_layout())
    emulator = {"kernel": box, "bias": bias}
    adapters = {"kernel": Adapter(normal(12, 4), normal(4, 2, 5), 8.0, layout=make_layout())}
    corrected = correct(adapters, params, emulator, limit=math.inf)
    x = normal(6, 4) @ adapters["kernel"].lora_a.T
    apply = intercept(model.apply)
    expected = apply({"params": attach(emulator, adapters)}, x)
    got = apply({"params": attach(params, corrected)}, x)
    assert relative(got - bias, expected - bias) < 1e-5
    merged = model.apply({"params": merge(params, corrected)}, x)
    assert relative(merged - bias, expected - bias) < 1e-5


def make_layout():
    return make_case("two outputs, scanned").adapter.layout
