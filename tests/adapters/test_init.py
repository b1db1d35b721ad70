import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.adapters import init_adapters
from emloc_jax.errors import RatioError, UnmatchedRuleError, UnsupportedKernelError
from emloc_jax.kernels import Layout
from tests.adapters.cases import make_spec

KEY = jax.random.key(0)
PINNED = 0.11095932


def specs(*all_specs):
    return {spec.path: spec for spec in all_specs}


def test_lora_a_is_uniform_as_in_peft_and_lora_b_zero():
    wide = make_spec(in_shape=(20, 20), out_shape=(300,), layout=Layout(num_in=2))
    adapter = init_adapters(KEY, specs(wide), where=".*", rank=200, alpha=16)["block/kernel"]
    a, bound = np.asarray(adapter.lora_a), 1 / np.sqrt(400)
    assert adapter.lora_a.shape == (20, 20, 200) and adapter.lora_b.shape == (200, 300)
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.999 * bound
    assert abs(a.mean()) < 0.01 * bound
    assert a.var() == pytest.approx(bound**2 / 3, rel=0.02)  # of a uniform distribution
    assert not np.any(np.asarray(adapter.lora_b))


def test_factors_are_float32_over_low_precision_kernels():
    spec = make_spec(dtype=jnp.bfloat16)
    adapter = init_adapters(KEY, specs(spec), where=".*", rank=2, alpha=4)["block/kernel"]
    assert adapter.lora_a.dtype == adapter.lora_b.dtype == jnp.float32
    assert adapter.scale == 2.0 and not adapter.corrected


def test_other_targets_do_not_change_a_draw():
    both = specs(make_spec("a/kernel"), make_spec("b/kernel"))
    all_of_them = init_adapters(KEY, both, where=".*", rank=2, alpha=4)
    alone = init_adapters(KEY, both, where="b", rank=2, alpha=4)
    assert list(all_of_them) == ["a/kernel", "b/kernel"] and list(alone) == ["b/kernel"]
    np.testing.assert_array_equal(all_of_them["b/kernel"].lora_a, alone["b/kernel"].lora_a)
    assert not np.any(all_of_them["a/kernel"].lora_a == all_of_them["b/kernel"].lora_a)


def test_a_draw_is_the_same_in_every_process():
    """The number pins the hash of the path: changing it would change every seeded result."""
    adapter = init_adapters(KEY, specs(make_spec()), where=".*", rank=1, alpha=1)["block/kernel"]
    assert float(adapter.lora_a[0, 0]) == pytest.approx(PINNED, abs=1e-7)


def test_legacy_keys_draw_the_same():
    old = init_adapters(jax.random.PRNGKey(0), specs(make_spec()), where=".*", rank=2, alpha=4)
    new = init_adapters(KEY, specs(make_spec()), where=".*", rank=2, alpha=4)
    np.testing.assert_array_equal(old["block/kernel"].lora_a, new["block/kernel"].lora_a)


def test_layers_of_a_stacked_kernel_draw_independently():
    spec = make_spec(stack_shape=(2, 3))
    adapter = init_adapters(KEY, specs(spec), where=".*", rank=2, alpha=4)["block/kernel"]
    assert adapter.lora_a.shape == (2, 3, 12, 2) and adapter.lora_b.shape == (2, 3, 2, 10)
    layers = np.asarray(adapter.lora_a).reshape(6, -1)
    assert len(np.unique(layers, axis=0)) == 6
    assert np.abs(np.corrcoef(layers) - np.eye(6)).max() < 0.8


@pytest.mark.parametrize("rank", [0, -1, 11])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(RatioError, match=r"1\.\.10 for kernel 'block/kernel'"):
        init_adapters(KEY, specs(make_spec()), where=".*", rank=rank, alpha=4)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(RatioError, match="alpha"):
        init_adapters(KEY, specs(make_spec()), where=".*", rank=2, alpha=alpha)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(UnmatchedRuleError, match="blok"):
        init_adapters(KEY, specs(make_spec()), where=["block", "blok"], rank=2, alpha=4)


def test_tied_and_slow_kernels_are_refused_unless_asked_for():
    tied = make_spec("embed/embedding", tied=True)
    slow = make_spec("mixer/kernel", handler=None, reason="no handler.", module_type="Mixer")
    with pytest.raises(UnsupportedKernelError, match=r"embed/embedding.*tied"):
        init_adapters(KEY, specs(tied, make_spec()), where=".*", rank=2, alpha=4)
    with pytest.raises(UnsupportedKernelError, match=r"mixer/kernel.*Mixer.*no handler"):
        init_adapters(KEY, specs(slow, make_spec()), where=".*", rank=2, alpha=4)
    allowed = init_adapters(
        KEY, specs(tied, slow), where=".*", rank=2, alpha=4, allow_materialize=True
    )
    assert list(allowed) == ["embed/embedding", "mixer/kernel"]
    assert list(init_adapters(KEY, specs(tied, make_spec()), where="block", rank=2, alpha=4))
