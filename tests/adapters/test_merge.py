import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.adapters import Adapter, attach, merge
from emloc_jax.errors import AdapterMismatchError, UnsupportedKernelError
from emloc_jax.kernels import materialize
from tests.adapters.cases import LAYOUTS, make_case, relative


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_float64_and_the_attached_box_in_every_layout(name, rslora):
    case = make_case(name, ratio=2.0, rslora=rslora)
    merged = merge(case.params, case.adapters)["block"]["kernel"]
    assert merged.shape == case.params["block"]["kernel"].shape
    scale = 2.0 * np.sqrt(4) if rslora else 2.0
    expected = case.kernel + scale * case.lora_a @ case.lora_b
    assert relative(case.adapter.layout.matrix(merged), expected) < 1e-6
    boxed = materialize(attach(case.params, case.adapters))["block"]["kernel"]
    assert relative(merged, boxed) < 1e-6


def test_a_low_precision_kernel_is_rounded_once():
    kernel = jnp.asarray([[1.0]], jnp.bfloat16)
    # Each half of the update is below bfloat16's resolution at 1; their sum is not.
    adapter = Adapter(jnp.full((1, 2), 0.003), jnp.ones((2, 1)), alpha=2.0)
    merged = merge({"kernel": kernel}, {"kernel": adapter})["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert float(merged[0, 0]) == float(jnp.bfloat16(1.006)) > 1


def test_everything_else_is_the_same_object():
    case = make_case()
    merged = merge(case.params, case.adapters)
    assert merged["block"]["bias"] is case.params["block"]["bias"]
    assert merged["block"]["kernel"] is not case.params["block"]["kernel"]


def test_sharding_names_stay():
    case = make_case("scanned")
    names = ("layers", "in", "out")
    params = {"block": {"kernel": nn.Partitioned(case.params["block"]["kernel"], names)}}
    merged = merge(params, case.adapters)["block"]["kernel"]
    assert isinstance(merged, nn.Partitioned) and merged.names == names
    assert relative(merged.value, merge(case.params, case.adapters)["block"]["kernel"]) == 0


def test_sharded_kernels_merge_on_four_devices():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jax.random.normal(jax.random.key(0), (8, 12))
    spec = jax.sharding.PartitionSpec("x", None)
    sharded = jax.device_put(kernel, jax.sharding.NamedSharding(mesh, spec))
    adapter = Adapter(jnp.ones((8, 2)), jnp.ones((2, 12)), alpha=1.0)
    merged = merge({"kernel": sharded}, {"kernel": adapter})["kernel"]
    np.testing.assert_allclose(merged, kernel + 1.0, rtol=1e-6)


def test_numpy_parameters_and_jit():
    case = make_case("scanned")
    host = jax.tree.map(np.asarray, case.params)
    expected = merge(case.params, case.adapters)["block"]["kernel"]
    assert relative(merge(host, case.adapters)["block"]["kernel"], expected) == 0
    assert relative(jax.jit(merge)(host, case.adapters)["block"]["kernel"], expected) < 1e-7


def test_a_boxed_base_is_refused():
    case = make_case()
    with pytest.raises(UnsupportedKernelError, match=r"block/kernel.*LowRankKernel"):
        merge(case.emulator, case.adapters)
    with pytest.raises(UnsupportedKernelError, match="LoraKernel"):
        merge(attach(case.params, case.adapters), case.adapters)


def test_an_integer_kernel_is_refused():
    params = {"kernel": jnp.ones((12, 10), jnp.int8)}
    with pytest.raises(UnsupportedKernelError, match="int8"):
        merge(params, {"kernel": make_case().adapter})


def test_a_foreign_adapter_is_refused():
    case = make_case()
    with pytest.raises(AdapterMismatchError, match="other/kernel"):
        merge(case.params, {"other/kernel": case.adapter})
