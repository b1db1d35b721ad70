"""Scanned or unrolled, rematerialised or not, whole or block by block: one function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct
from flax.core import meta

from emloc_jax.errors import ConfigError
from emloc_jax.models import Decoder, block_stack, stack_layers, unstack_layers
from tests.models.tiny import CONFIG, tokens, unrolled_params

SEGMENTS = np.array([[1] * 6 + [2] * 4, [1] * 7 + [0] * 3], np.int32)


@struct.dataclass
class Product(meta.AxisMetadata):
    """A boxed kernel of its own, so that these tests need no other room."""

    left: jax.Array
    right: jax.Array
    note: str = struct.field(pytree_node=False, default="")

    def unbox(self):
        return self.left @ self.right

    def replace_boxed(self, val):
        raise TypeError

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def boxed(params, note="", rank=5):
    """Every q_proj and down_proj kernel as a product; the same function as ``unboxed``."""

    def box(path, leaf):
        if path[-1].key != "kernel" or path[-2].key not in ("q_proj", "down_proj"):
            return leaf
        u, s, vt = np.linalg.svd(leaf, full_matrices=False)
        return Product(u[..., :rank] * s[..., None, :rank], vt[..., :rank, :], note)

    return jax.tree_util.tree_map_with_path(box, params)


def loss_and_gradient(model, params):
    def loss(params):
        logits = model.apply({"params": params}, tokens(), None, SEGMENTS)
        return jnp.sum(jnp.where(SEGMENTS[..., None] > 0, logits, 0.0) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def plain_loss_and_gradient():
    return loss_and_gradient(Decoder(CONFIG), unrolled_params())


@pytest.mark.parametrize("scan, remat", [(False, True), (True, True), (True, "dots")])
def test_scanned_and_rematerialised_equal_plain(scan, remat):
    params = unrolled_params()
    model = Decoder(CONFIG, scan_layers=scan, remat=remat)
    value, gradient = loss_and_gradient(model, stack_layers(params, 2) if scan else params)
    gradient = unstack_layers(gradient, 2) if scan else gradient
    expected_value, expected_gradient = plain_loss_and_gradient()
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3),
        gradient,
        expected_gradient,
    )


def test_scanned_init_has_the_scanned_tree():
    shapes = jax.eval_shape(
        Decoder(CONFIG, scan_layers=True).init, jax.random.key(0), tokens(1, 1)
    )["params"]
    expected = stack_layers(unrolled_params(), 2)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, expected)
    init = jax.jit(Decoder(CONFIG, scan_layers=True).init)
    params = init(jax.random.key(0), tokens(1, 1))["params"]
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])  # every layer is drawn by itself
    np.testing.assert_allclose(np.std(kernel), CONFIG.initializer_range, rtol=0.1)


def test_remat_keeps_less():
    """Measured where layers are scanned; unrolled, the barriers against merging are counted."""
    config = dataclasses.replace(CONFIG, num_layers=4)
    inputs = jax.ShapeDtypeStruct((2, 48), jnp.int32)

    def lowered(**options):
        model = Decoder(config, **options)
        params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
        loss = jax.grad(lambda p, x: jnp.sum(model.apply({"params": p}, x) ** 2))
        return jax.jit(loss).lower(params, inputs)

    kept, products, remade = (
        lowered(scan_layers=True, remat=remat).compile().memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "block")
    )
    assert remade < 0.7 * kept
    assert remade < products < kept
    assert lowered(remat=True).as_text().count("optimization_barrier") == 4


@pytest.mark.parametrize("box", [False, True])
def test_stack_and_unstack_are_inverse(box):
    params = boxed(unrolled_params()) if box else unrolled_params()
    again = unstack_layers(stack_layers(params, 2), 2)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_host_arrays_stay_on_the_host():
    params = jax.tree.map(np.asarray, unrolled_params())
    stacked = stack_layers(params, 2)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stacked))


def test_layers_that_differ_cannot_be_stacked():
    params = unrolled_params()
    layers = params["layers"]
    uneven = {**params, "layers": {**layers, "1": boxed(layers["1"], rank=3)}}
    with pytest.raises(ConfigError, match="Layers 0 and 1"):
        stack_layers(uneven, 2)
    uneven = boxed(params)
    uneven["layers"]["1"] = boxed(layers["1"], rank=3)
    with pytest.raises(ConfigError, match="Layers 0 and 1.*left.*5.*3"):
        stack_layers(uneven, 2)
    uneven["layers"]["1"] = boxed(layers["1"], note="another")
    with pytest.raises(ConfigError, match="Layers 0 and 1"):
        stack_layers(uneven, 2)
    with pytest.raises(ConfigError, match="0 to 3"):
        stack_layers(params, 4)
    with pytest.raises(ConfigError, match="4 scanned layers"):
        unstack_layers(stack_layers(params, 2), 4)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_block_stack_composes_to_the_model(scan, box):
    model, params = Decoder(CONFIG, scan_layers=scan), unrolled_params()
    params = boxed(params) if box else params
    params = stack_layers(params, 2) if scan else params
    stack = block_stack(model)
    expected = jax.jit(model.apply)({"params": params}, tokens(), None, SEGMENTS)
    composed = jax.jit(stack)(params, tokens(), None, SEGMENTS)
    np.testing.assert_allclose(composed, expected, atol=2e-5)


def test_other_models_have_no_block_stack_here():
    with pytest.raises(ConfigError, match="block stack of a Dense .* Declare a BlockStack"):
        block_stack(nn.Dense(3))


def test_block_stack_wraps_every_part():
    wrapped = []

    def wrap(apply):
        def counting(*args, **kwargs):
            wrapped.append(kwargs.get("method", "block"))
            return apply(*args, **kwargs)

        return counting

    jax.eval_shape(block_stack(Decoder(CONFIG), wrap=wrap), unrolled_params(), tokens())
    assert wrapped == ["embed", "block", "block", "head"]


def test_bf16_computes_in_bf16_and_returns_fp32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), unrolled_params())
    variables = {"params": stack_layers(params, 2)}
    exact = jax.jit(Decoder(CONFIG, scan_layers=True).apply)(variables, tokens())
    model = Decoder(CONFIG, dtype=jnp.bfloat16, scan_layers=True)
    logits = jax.jit(model.apply)(variables, tokens())
    hidden = jax.eval_shape(
        functools.partial(model.apply, method="hidden"), variables, tokens(), None, SEGMENTS
    )
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    difference = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 3e-2


def test_an_unknown_remat_is_refused():
    with pytest.raises(ConfigError, match="remat is 'all'; give none, block or dots"):
        Decoder(CONFIG, remat="all").init(jax.random.key(0), tokens(1, 1))
