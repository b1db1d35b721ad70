"""Compact taps of every handler: moments by hand, taken through the kernel afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.kernels import TappedKernel, get_leaf, intercept, set_leaves
from tests.kernels.blocks import B, T, matrix
from tests.kernels.test_contract_matrix import TAPS, handlers, moments_by_hand, setup, shard

NAMES = ("through", "diagonal", "gradient_through", "gradient_diagonal")


def phantoms_of(spec):
    stack, d_in, d_out = spec.stack_shape, spec.d_in, spec.d_out
    shapes = dict(zip(NAMES, [(d_out, d_out), (d_in,), (d_in, d_in), (d_out,)], strict=True))
    return {name: jnp.zeros(stack + shape) for name, shape in shapes.items()}


def through_by_hand(block, params, moment, gradient, stacked):
    """`K^T C K`, diagonal of `C`, `K G K^T`, diagonal of `G`, in float64; biases play no part."""
    kernel = np.asarray(params["linear"][block.param.split("/")[1]], np.float64)
    kernels = [matrix(block, k) for k in kernel] if stacked else [matrix(block, kernel)]
    pairs = zip(moment, gradient, strict=True) if stacked else [(moment, gradient)]
    layers = [
        (k.T @ c @ k, np.diag(c), k @ g @ k.T, np.diag(g))
        for k, (c, g) in zip(kernels, pairs, strict=True)
    ]
    wanted = [np.stack(values) for values in zip(*layers, strict=True)]
    return dict(zip(NAMES, wanted if stacked else [v[0] for v in wanted], strict=True))


@handlers
@pytest.mark.parametrize(("transform", "masked"), TAPS)
def test_compact_taps_return_the_moments_through_the_kernel(block, transform, masked):
    model, params, x, kernels = setup(block, transform)
    mask = np.ones((B, T), bool)
    if masked:
        mask[0, 3:] = mask[1, 4:] = False
    ((path, spec),) = kernels.items()
    stack = spec.stack_shape
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
    found = wrap(jax.grad(loss))(phantoms_of(spec))
    layers = params["layers"]
    moment, gradient, _ = moments_by_hand(block, layers, x, transform, mask)
    wanted = through_by_hand(block, layers, moment, gradient, bool(stack))
    relative = 3e-2 if transform == "bf16" else 1e-5
    for name, want in wanted.items():
        assert found[name].dtype == jnp.float32
        assert np.linalg.norm(found[name] - want) <= relative * np.linalg.norm(want), name


@handlers
def test_masked_rows_may_hold_anything(block):
    model, params, x, kernels = setup(block, "jit")
    mask = np.arange(T) < 4
    mask = jnp.broadcast_to(mask, (B, T))
    ((path, spec),) = kernels.items()

    def loss(phantoms, x):
        tap = TappedKernel(get_leaf(params, path), **phantoms, mask=mask, layout=spec.layout)
        y = intercept(model.apply)({"params": set_leaves(params, {path: tap})}, x)
        return jnp.sum(jnp.where(mask[..., None], jnp.sin(y), 0))

    run = jax.jit(jax.grad(loss))
    clean, dirty = (run(phantoms_of(spec), x.at[:, 4].set(v)) for v in (0.0, jnp.nan))
    for name in NAMES:  # The last token of a causal block is seen by no other.
        np.testing.assert_array_equal(clean[name], dirty[name])


def test_a_bf16_kernel_is_multiplied_in_fp32():
    """What the factorization computes with is the kernel as stored, not the module's product."""
    from tests.kernels.blocks import DenseBlock

    model, params, x, kernels = setup(DenseBlock, "jit")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    ((path, spec),) = kernels.items()

    def loss(phantoms):
        tap = TappedKernel(get_leaf(params, path), **phantoms, layout=spec.layout)
        return jnp.sum(intercept(model.apply)({"params": set_leaves(params, {path: tap})}, x))

    found = jax.jit(jax.grad(loss))(phantoms_of(spec))["through"]
    y = np.float64(x).reshape(-1, spec.d_in) @ np.float64(get_leaf(params, path))
    np.testing.assert_allclose(found, y.T @ y, rtol=1e-5, atol=1e-5)
