import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from emloc_jax.adapters import Adapter
from tests.adapters.cases import LAYOUTS, make_case


@pytest.mark.parametrize("name", LAYOUTS)
def test_shapes_and_matrix_views(name):
    _, stack, in_shape, out_shape = LAYOUTS[name]
    case = make_case(name)
    adapter = case.adapter
    assert adapter.stack_shape == stack and adapter.rank == 4
    assert (adapter.in_shape, adapter.out_shape) == (in_shape, out_shape)
    assert adapter.kernel_shape == case.params["block"]["kernel"].shape
    np.testing.assert_array_equal(adapter.matrices()[0], case.lora_a.astype(np.float32))
    np.testing.assert_array_equal(adapter.matrices()[1], case.lora_b.astype(np.float32))
    again = adapter.with_matrices(*adapter.matrices(), corrected=True)
    assert again.corrected and again.lora_a.shape == adapter.lora_a.shape
    np.testing.assert_array_equal(again.lora_b, adapter.lora_b)


def test_scale():
    factors = (jnp.zeros((8, 4)), jnp.zeros((4, 8)))
    assert Adapter(*factors, alpha=2.0).scale == 0.5
    assert Adapter(*factors, alpha=2.0, rslora=True).scale == 1.0


def test_only_the_factors_are_leaves_and_the_rest_is_static():
    adapter = make_case(ratio=2.0).adapter
    assert len(jax.tree.leaves(adapter)) == 2
    doubled = jax.jit(lambda a: jax.tree.map(lambda x: 2 * x, a))(adapter)
    assert doubled.scale == 2.0 and doubled.layout == adapter.layout
    assert jax.tree.structure(adapter) != jax.tree.structure(adapter.replace(alpha=1.0))


def test_optimizers_and_serialization_take_it():
    adapters = make_case().adapters
    optimizer = optax.adam(1e-3)
    updates, _ = optimizer.update(adapters, optimizer.init(adapters))
    assert optax.apply_updates(adapters, updates)["block/kernel"].alpha == 4.0
    restored = serialization.from_bytes(adapters, serialization.to_bytes(adapters))
    np.testing.assert_array_equal(restored["block/kernel"].lora_a, adapters["block/kernel"].lora_a)
