"""Every handler under every transform: fast path == unboxed model, and moments == by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emloc_jax.kernels import (
    LoraKernel,
    LowRankKernel,
    TappedKernel,
    find_kernels,
    flatten_leaves,
    get_leaf,
    intercept,
    materialize,
    set_leaves,
)
from tests.kernels.blocks import BLOCKS, B, D, T, by_hand, rows

LAYERS = 3
TRANSFORMS = ["eager", "jit", "scan", "scan_remat", "nn_jit", "vmap", "bf16", "sharded"]
matrix = pytest.mark.parametrize("transform", TRANSFORMS)
handlers = pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)


class Repeat(nn.Module):
    """The block once, stacked by nn.scan, wrapped by nn.jit, or vmapped over an ensemble."""

    block: type
    transform: str

    @nn.compact
    def __call__(self, x):
        block, dtype = self.block, jnp.bfloat16 if self.transform == "bf16" else None
        if self.transform == "scan_remat":
            block = nn.remat(block, prevent_cse=False)
        if self.transform.startswith("scan"):
            block = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
            )
        elif self.transform == "nn_jit":
            block = nn.jit(block)
        elif self.transform == "vmap":
            block = nn.vmap(block, variable_axes={"params": 0}, split_rngs={"params": True})
        return block(dtype=dtype, name="layers")(x, None if self.transform != "vmap" else x)[0]


def setup(block, transform, seed=0):
    key = jax.random.key(seed)
    shape = (LAYERS, B, T, D) if transform == "vmap" else (B, T, D)
    x = jax.random.normal(jax.random.fold_in(key, 1), shape)
    model = Repeat(block, transform)
    params = model.init(key, x)["params"]
    keys = jax.random.split(jax.random.fold_in(key, 2), len(jax.tree.leaves(params)))
    leaves, treedef = jax.tree.flatten(params)
    noisy = [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(treedef, noisy)  # biases are not zero
    return model, params, x, find_kernels(model.apply, params, x)


def boxed(params, kernels, rank=2, seed=3):
    """Each kernel as emulator plus adapter, the nesting used in training."""
    leaves = {}
    for i, (path, spec) in enumerate(kernels.items()):
        keys = jax.random.split(jax.random.key(seed + i), 4)
        left = jax.random.normal(keys[0], spec.stack_shape + spec.in_shape + (rank,))
        right = jax.random.normal(keys[1], spec.stack_shape + (rank,) + spec.out_shape)
        a = jax.random.normal(keys[2], left.shape)
        b = jax.random.normal(keys[3], right.shape)
        emulator = LowRankKernel(0.5 * left, 0.5 * right, spec.layout)
        leaves[path] = LoraKernel(emulator, 0.5 * a, 0.5 * b, alpha=3.0, layout=spec.layout)
    return set_leaves(params, leaves)


def shard(params):
    """Factors with one even axis each spread over the devices."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))

    def place(leaf):
        spec = [None] * leaf.ndim
        for axis in range(leaf.ndim):
            if leaf.shape[axis] % 2 == 0:
                spec[axis] = "x"
                break
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, params)


@handlers
@matrix
def test_fast_path_equals_unboxed_forward_and_gradient(block, transform):
    model, params, x, kernels = setup(block, transform)
    assert len(kernels) == 1 and all(spec.handler for spec in kernels.values())
    params = boxed(params, kernels)
    if transform == "sharded":
        params = shard(params)

    def loss(apply, params):
        y = apply({"params": params}, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    wrap = (lambda f: f) if transform == "eager" else jax.jit
    fast = wrap(jax.value_and_grad(lambda p: loss(intercept(model.apply), p), has_aux=True))
    slow = wrap(jax.value_and_grad(lambda p: loss(model.apply, p), has_aux=True))
    plain = wrap(lambda p: loss(model.apply, p))
    (_, y_fast), grads_fast = fast(params)
    (_, y_slow), grads_slow = slow(params)
    _, y_plain = plain(materialize(params))

    tolerance = (
        {"rtol": 5e-2, "atol": 1e-1} if transform == "bf16" else {"rtol": 2e-5, "atol": 2e-5}
    )
    chex.assert_trees_all_close(y_fast, y_slow, **tolerance)
    chex.assert_trees_all_close(y_fast, y_plain, **tolerance)
    if transform == "bf16":  # Rounding differs between the orders of multiplication.
        for g_fast, g_slow in zip(*map(jax.tree.leaves, (grads_fast, grads_slow)), strict=True):
            assert jnp.linalg.norm(g_fast - g_slow) <= 0.05 * jnp.linalg.norm(g_slow)
    else:
        chex.assert_trees_all_close(grads_fast, grads_slow, rtol=1e-4, atol=1e-4)
    if transform == "sharded":
        assert any(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(params))


def moments_by_hand(block, params, x, transform, mask):
    """sum x x^T and sum g g^T of every layer from explicit arrays, for the loss sum(sin(y))."""
    weights = np.asarray(mask, np.float64)
    layers = LAYERS if transform in ("scan", "scan_remat", "vmap") else 1
    stacked = transform in ("scan", "scan_remat", "vmap")
    slices = [
        jax.tree.map(lambda p, i=i: p[i], params) if stacked else params for i in range(layers)
    ]

    def forward(deltas):
        if transform == "vmap":
            ys = [by_hand(block, s, x[i], deltas[i]) for i, s in enumerate(slices)]
            return sum(jnp.sum(jnp.sin(y)) for y in ys), list(x)
        inputs, y = [], x
        for s, delta in zip(slices, deltas, strict=True):
            inputs.append(y)
            y = by_hand(block, s, y, delta)
        return jnp.sum(jnp.sin(y)), inputs

    (_, inputs), grads = jax.value_and_grad(forward, has_aux=True)(jnp.zeros((layers, B, T, D)))
    moments, gradients = [], []
    for u, g in zip(inputs, grads, strict=True):
        u = np.asarray(rows(block, u), np.float64)
        g = np.asarray(g, np.float64)
        moments.append(np.einsum("bti,btj,bt->ij", u, u, weights))
        gradients.append(np.einsum("bti,btj,bt->ij", g, g, weights))
    squeeze = (lambda values: np.stack(values)) if stacked else (lambda values: values[0])
    return squeeze(moments), squeeze(gradients), weights.sum()


# The mask is data of the box, so a few transforms say it all.
TAPS = [(t, False) for t in TRANSFORMS] + [(t, True) for t in ("jit", "scan", "vmap", "sharded")]


@handlers
@pytest.mark.parametrize(("transform", "masked"), TAPS)
def test_taps_return_the_second_moments(block, transform, masked):
    model, params, x, kernels = setup(block, transform)
    mask = np.ones((B, T), bool)
    if masked:
        mask[0, 3:] = mask[1, 4:] = False
        if transform != "scan":  # What a masked row holds must not matter.
            x = x.at[..., 1, 4, :].set(7.0)
    ((path, spec),) = kernels.items()
    stack = spec.stack_shape
    phantoms = {
        "moment": jnp.zeros(stack + (spec.d_in, spec.d_in)),
        "count": jnp.zeros(stack),
        "gradient": jnp.zeros(stack + (spec.d_out, spec.d_out)),
    }
    if transform == "sharded":
        params = shard(params)
    stacked_mask = jnp.broadcast_to(mask, stack + mask.shape) if masked else None

    def loss(phantoms):
        tap = TappedKernel(
            get_leaf(params, path), **phantoms, mask=stacked_mask, layout=spec.layout
        )
        y = intercept(model.apply)({"params": set_leaves(params, {path: tap})}, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    wrap = (lambda f: f) if transform == "eager" else jax.jit
    found = wrap(jax.grad(loss))(phantoms)
    layers = params["layers"]
    moment, gradient, count = moments_by_hand(block, layers, x, transform, mask)
    relative = 3e-2 if transform == "bf16" else 1e-5
    for got, want in ((found["moment"], moment), (found["gradient"], gradient)):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) <= relative * np.linalg.norm(want)
    np.testing.assert_array_equal(found["count"], np.full(stack, count))


@handlers
def test_one_trace_for_many_calls(block):
    model, params, x, kernels = setup(block, "scan_remat")
    params = boxed(params, kernels)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(params, x):
        return intercept(model.apply)({"params": params}, x)

    for scale in (1.0, 2.0, 3.0):
        forward(params, scale * x)


def test_all_paths_are_found_once():
    for block in BLOCKS:
        for transform in TRANSFORMS:
            _, params, _, kernels = setup(block, transform)
            assert list(kernels) == [f"layers/{block.param}"]
            spec = next(iter(kernels.values()))
            assert spec.shape == flatten_leaves(params)[spec.path].shape
            assert spec.tied == (block.__name__ == "AttendBlock")
