"""A parameter that is trained whole, among adapters, against NumPy and by the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.adapters import (
    Whole,
    attach,
    choose_limit,
    correct,
    correction_report,
    dropout_keys,
    init_whole,
    merge,
)
from emloc_jax.errors import (
    AdapterMismatchError,
    UnmatchedRuleError,
    UnsupportedKernelError,
)
from emloc_jax.kernels import LowRankKernel, intercept
from emloc_jax.training._optimizer import decays
from tests.adapters.cases import make_case, product, relative

HEAD = {"head/kernel": (10, 3), "head/bias": (3,)}


class Net(nn.Module):
    """A block that is emulated, and a head."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.Dense(10, name="block")(x))


def head_case(**options):
    """A case with a head in both trees, and one that was trained whole."""
    case, rng = make_case(**options), np.random.default_rng(3)
    old = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in HEAD.items()}
    new = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in HEAD.items()}
    head = {path.split("/")[1]: jnp.asarray(value) for path, value in old.items()}
    case.params["head"], case.emulator["head"] = head, head
    case.adapters |= {path: Whole(jnp.asarray(value)) for path, value in new.items()}
    return case, new


def outputs(kernel, head, x):
    return (x @ kernel + 1.0) @ head["head/kernel"].astype(float) + head["head/bias"]


def test_it_takes_the_parameter_s_place_here_and_there():
    case, new = head_case(ratio=2.0)
    x = np.random.default_rng(0).standard_normal((5, 12))
    for params, kernel in ((case.params, case.kernel), (case.emulator, case.emulated)):
        got = intercept(Net().apply)({"params": attach(params, case.adapters)}, x)
        expected = outputs(kernel + product(case.adapter), new, x)
        assert relative(got, expected) < 1e-5
    merged = merge(case.params, case.adapters)
    assert relative(Net().apply({"params": merged}, x), expected=outputs(
        case.kernel + product(case.adapter), new, x)) < 1e-5  # fmt: skip
    assert case.params["head"]["bias"] is not merged["head"]["bias"]


def test_the_gradient_of_the_head_is_that_of_numpy():
    case, new = head_case()
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)

    def loss(adapters):
        y = intercept(Net().apply)({"params": attach(case.emulator, adapters)}, x)
        return (y**2).sum() / 2

    gradient = jax.grad(loss)(case.adapters)
    assert jax.tree.structure(gradient) == jax.tree.structure(case.adapters)
    hidden = x @ (case.emulated + product(case.adapter)) + 1.0
    y = outputs(case.emulated + product(case.adapter), new, x)
    assert relative(gradient["head/kernel"].value, hidden.T @ y) < 1e-4
    assert relative(gradient["head/bias"].value, y.sum(0)) < 1e-4
    assert np.linalg.norm(gradient["block/kernel"].lora_a) > 0


@pytest.mark.parametrize("limit", [0.0, 1.0, np.inf])
def test_correction_leaves_it_alone_and_the_adapters_as_without_it(limit):
    case, _ = head_case(ratio=2.0)
    corrected = correct(case.adapters, case.params, case.emulator, limit=limit)
    assert list(corrected) == list(case.adapters)
    assert all(corrected[path] is case.adapters[path] for path in HEAD)
    alone = make_case(ratio=2.0)
    expected = correct(alone.adapters, alone.params, alone.emulator, limit=limit)
    np.testing.assert_array_equal(corrected["block/kernel"].lora_b, expected["block/kernel"].lora_b)
    report = correction_report(case.adapters, case.params, case.emulator, limit=limit)
    assert [kernel.path for kernel in report.kernels] == ["block/kernel"]


def test_the_limit_is_chosen_under_the_trained_head():
    case, new = head_case()
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)

    def loss(params, x):
        return (intercept(Net().apply)({"params": params}, x) ** 2).sum(), jnp.float32(1)

    _, losses = choose_limit(
        case.adapters, case.params, case.emulator, loss, [x], candidates=(np.inf,)
    )
    plain = outputs(case.kernel + product(case.adapter), new, x)
    full = correct(case.adapters, case.params, case.emulator, limit=np.inf)
    other = outputs(case.kernel + product(full["block/kernel"]), new, x)
    assert losses[0.0] == pytest.approx((plain**2).sum(), rel=1e-4)
    assert losses[np.inf] == pytest.approx((other**2).sum(), rel=1e-4)


def test_made_as_fp32_copies_and_merged_in_the_dtype_of_the_base():
    params = {"head": {"kernel": jnp.full((2, 3), 1.0, jnp.bfloat16), "bias": jnp.zeros(3)}}
    whole = init_whole(params, where="head/.*")
    assert {path: one.value.dtype for path, one in whole.items()} == dict.fromkeys(
        HEAD, jnp.dtype("float32")
    )
    assert whole["head/bias"].value is not params["head"]["bias"]  # training may consume it
    jax.jit(lambda x: jax.tree.map(lambda v: v + 1, x), donate_argnums=0)(whole)
    assert float(params["head"]["bias"][0]) == 0.0
    fine = {"head/kernel": Whole(jnp.full((2, 3), 1.0 + 2**-12))}
    assert attach(params, fine)["head"]["kernel"] is fine["head/kernel"].value
    merged = merge(params, fine)["head"]["kernel"]
    assert merged.dtype == jnp.bfloat16 and (merged == 1).all()


def test_sharding_metadata_stays_and_a_compressed_kernel_gives_way():
    value = Whole(jnp.ones((2, 3)))
    params = {"kernel": nn.Partitioned(jnp.zeros((2, 3)), ("a", "b"))}
    for done in (attach(params, {"kernel": value}), merge(params, {"kernel": value})):
        assert done["kernel"].names == ("a", "b") and (done["kernel"].value == 1).all()
    box = {"kernel": LowRankKernel(jnp.ones((2, 1)), jnp.ones((1, 3)))}
    assert attach(box, {"kernel": value})["kernel"] is value.value
    with pytest.raises(UnsupportedKernelError, match="a LowRankKernel"):
        merge(box, {"kernel": value})
    with pytest.raises(UnsupportedKernelError, match="a LowRankKernel"):
        init_whole(box, where="kernel")


def test_what_does_not_fit_is_said():
    case, _ = head_case()
    wrong = {"head/bias": Whole(jnp.ones(4))}
    with pytest.raises(AdapterMismatchError, match=r"\(3,\), trained whole as \(4,\)"):
        attach(case.params, wrong)
    with pytest.raises(AdapterMismatchError, match="the emulator"):
        correct(case.adapters, case.params, {"block": case.emulator["block"]})
    with pytest.raises(UnmatchedRuleError, match="tail"):
        init_whole(case.params, where="tail/.*")


def test_no_dropout_and_no_decay_of_biases():
    case, _ = head_case()
    assert list(dropout_keys(jax.random.key(0), case.adapters)) == ["block/kernel"]
    decay = decays(case.adapters)
    assert {path: decay[path].value for path in HEAD} == {"head/kernel": True, "head/bias": False}
