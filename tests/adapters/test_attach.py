import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.adapters import attach
from emloc_jax.errors import AdapterMismatchError, ConfigError
from emloc_jax.kernels import LoraKernel, intercept, materialize
from tests.adapters.cases import LAYOUTS, make_case, relative


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tree", ["params", "emulator"])
def test_boxes_without_arithmetic(name, tree):
    case = make_case(name, ratio=2.0)
    params = getattr(case, tree)
    attached = attach(params, case.adapters)
    box = attached["block"]["kernel"]
    assert isinstance(box, LoraKernel) and box.dropout_key is None
    assert box.base is params["block"]["kernel"]
    assert box.lora_a is case.adapter.lora_a and box.lora_b is case.adapter.lora_b
    assert attached["block"]["bias"] is params["block"]["bias"]
    assert not isinstance(params["block"]["kernel"], LoraKernel)  # the input is not changed
    base = case.kernel if tree == "params" else case.emulated
    matrix = case.adapter.layout.matrix(materialize(attached)["block"]["kernel"])
    assert relative(matrix, base + 2.0 * case.lora_a @ case.lora_b) < 1e-6


@pytest.mark.parametrize("tree", ["params", "emulator"])
def test_partitioned_leaves(tree):
    case = make_case()
    params = getattr(case, tree)
    wrapped = {"block": {"kernel": nn.Partitioned(params["block"]["kernel"], (None, None))}}
    got = materialize(attach(wrapped, case.adapters))["block"]["kernel"]
    assert relative(got, materialize(attach(params, case.adapters))["block"]["kernel"]) == 0


def test_only_the_adapters_train():
    case = make_case()
    apply = intercept(nn.Dense(10, name="block").apply)
    x = jax.random.normal(jax.random.key(0), (5, 12))

    def loss(adapters):
        return (apply({"params": attach(case.emulator, adapters)["block"]}, x) ** 2).sum()

    gradient = jax.grad(loss)(case.adapters)["block/kernel"]
    assert jax.tree.structure(gradient) == jax.tree.structure(case.adapter)
    y = np.asarray(x, float) @ (case.emulated + case.lora_a @ case.lora_b) + 1.0
    expected = case.lora_a.T @ np.asarray(x, float).T @ (2 * y)
    assert relative(gradient.lora_b, expected) < 1e-5


class TestDropout:
    """`Adapter` branch alone: kernel zero, so the output is the branch's."""

    def outputs(self, key, rate=0.25, d_in=12):
        case = make_case()
        params = {"block": {"kernel": jnp.zeros((12, 10))}}
        attached = attach(params, case.adapters, dropout=rate, key=key)
        apply = intercept(nn.Dense(10, use_bias=False).apply)
        return apply({"params": attached["block"]}, jnp.ones((4000, d_in))), case

    def test_is_unbiased_and_has_the_right_variance(self):
        y, case = self.outputs(jax.random.key(1))
        product = case.lora_a @ case.lora_b
        np.testing.assert_allclose(y.mean(0), product.sum(0), atol=0.4)
        # Var of Σ_i m_i p_i / (1 - rate) with Bernoulli m is rate / (1 - rate) Σ p².
        expected = 0.25 / 0.75 * (product**2).sum(0)
        np.testing.assert_allclose(y.var(0), expected, rtol=0.1)

    def test_same_key_same_mask_and_another_key_another(self):
        first, _ = self.outputs(jax.random.key(1))
        again, _ = self.outputs(jax.random.key(1))
        other, _ = self.outputs(jax.random.key(2))
        np.testing.assert_array_equal(first, again)
        assert np.mean(np.asarray(first != other)) > 0.5

    def test_kernels_and_layers_have_their_own_keys(self):
        case = make_case("scanned")
        params = {"a": case.params["block"], "b": case.params["block"]}
        adapters = {"a/kernel": case.adapter, "b/kernel": case.adapter}
        attached = attach(params, adapters, dropout=0.5, key=jax.random.key(0))
        keys = [attached[name]["kernel"].dropout_key for name in "ab"]
        assert [key.shape for key in keys] == [(3,), (3,)]
        assert all(jnp.issubdtype(key.dtype, jax.dtypes.prng_key) for key in keys)
        data = np.concatenate([np.asarray(jax.random.key_data(key)) for key in keys])
        assert len(np.unique(data, axis=0)) == 6

    def test_no_rate_no_key_in_the_box(self):
        case = make_case()
        attached = attach(case.params, case.adapters, key=jax.random.key(0))
        assert attached["block"]["kernel"].dropout_key is None

    @pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
    def test_an_impossible_rate_is_refused(self, rate):
        case = make_case()
        with pytest.raises(ConfigError, match=r"\[0, 1\)"):
            attach(case.params, case.adapters, dropout=rate, key=jax.random.key(0))

    def test_a_rate_without_key_is_refused(self):
        case = make_case()
        with pytest.raises(ConfigError, match="key"):
            attach(case.params, case.adapters, dropout=0.1)


def test_missing_kernels_are_named_on_both_sides():
    case = make_case()
    adapters = {f"layers/{i}/kernel": case.adapter for i in range(5)}
    with pytest.raises(AdapterMismatchError) as error:
        attach(case.params, adapters)
    message = str(error.value)
    assert "5 of 5 adapters" in message and "'layers/2/kernel' and 2 more" in message
    assert "'block/kernel'" in message


def test_the_variables_dictionary_instead_of_params_is_explained():
    case = make_case()
    with pytest.raises(AdapterMismatchError, match="bare `params` collection"):
        attach({"params": case.params}, case.adapters)


@pytest.mark.parametrize("tree", ["params", "emulator"])
def test_differing_shapes_are_named_on_both_sides(tree):
    case, other = make_case(), make_case("scanned")
    with pytest.raises(AdapterMismatchError, match=r"kernel \(12, 10\), adapter for \(3, 12, 10\)"):
        attach(getattr(case, tree), other.adapters)


def test_factors_that_do_not_belong_together_are_refused():
    case = make_case()
    torn = case.adapter.replace(lora_b=jnp.zeros((5, 10)))
    with pytest.raises(AdapterMismatchError, match=r"lora_a \(12, 4\), lora_b \(5, 10\)"):
        attach(case.params, {"block/kernel": torn})


def test_a_second_adapter_on_the_same_kernel_is_refused():
    case = make_case()
    once = attach(case.params, case.adapters, dropout=0.1, key=jax.random.key(0))
    with pytest.raises(AdapterMismatchError, match="carries an adapter already"):
        attach(once, case.adapters)
