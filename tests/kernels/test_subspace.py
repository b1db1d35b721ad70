"""Compressed gradients under every handler and transform, against `P^T G Q` in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.kernels import (
    SubspaceKernel,
    get_leaf,
    intercept,
    make_projector,
    materialize,
    set_leaves,
    stack_projectors,
)
from tests.kernels.blocks import (
    ConvBlock,
    D,
    DenseBlock,
    DenseGeneralInBlock,
    DenseGeneralOutBlock,
    EinsumOutBlock,
    EinsumTransposedBlock,
)
from tests.kernels.test_contract_matrix import setup


class HeadBlock(nn.Module):
    """A table that is only used as a head, so that its whole gradient is the head's."""

    dtype: jnp.dtype | None = None
    param = "linear/embedding"

    def setup(self):
        self.linear = nn.Embed(D, D, dtype=self.dtype)

    def __call__(self, x, _=None):
        return x + jnp.tanh(self.linear.attend(x)), None


TRANSFORMS = ("eager", "jit", "scan", "scan_remat", "nn_jit", "vmap", "bf16")
CASES = [
    *((b, t) for b in (DenseBlock, DenseGeneralInBlock, EinsumTransposedBlock) for t in TRANSFORMS),
    *((b, "scan_remat") for b in (DenseGeneralOutBlock, EinsumOutBlock, ConvBlock, HeadBlock)),
    *((b, "jit") for b in (ConvBlock, HeadBlock)),
]


def projectors(spec, seed):
    """A pair for a kernel, one for each of its layers; the core is not square."""

    def stacked(seed, d, size):
        layers = int(np.prod(spec.stack_shape))
        ps = [make_projector(seed + i, d, size, 2, law="normal") for i in range(layers)]
        return stack_projectors(ps) if spec.stack_shape else ps[0]

    return stacked(seed, spec.d_in, spec.d_in - 1), stacked(seed + 50, spec.d_out, spec.d_out - 2)


def dense64(p):
    """`(layers, d, size)` from positions and values, without the library's products."""
    indices = np.asarray(p.indices).reshape(-1, p.d, p.nnz)
    values = np.asarray(p.values, np.float64).reshape(indices.shape)
    matrices = np.zeros((len(indices), p.d, p.size))
    for layer, row, k in np.ndindex(indices.shape):
        matrices[layer, row, indices[layer, row, k]] = values[layer, row, k]
    return matrices


@pytest.mark.parametrize(("block", "transform"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_cotangent_of_the_core_is_the_compressed_gradient(block, transform):
    model, params, x, kernels = setup(block, transform)
    ((path, spec),) = kernels.items()
    p, q = projectors(spec, seed=1)
    core = jnp.zeros((*spec.stack_shape, p.size, q.size))

    def value(params):
        y = intercept(model.apply)({"params": params}, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    def subspace(core):
        box = SubspaceKernel(get_leaf(params, path), p, core, q, spec.layout)
        return value(set_leaves(params, {path: box}))

    def plain(kernel):
        return value(set_leaves(params, {path: kernel}))

    wrap = (lambda f: f) if transform == "eager" else jax.jit
    gradient, y = wrap(jax.grad(subspace, has_aux=True))(core)
    explicit, y_plain = wrap(jax.grad(plain, has_aux=True))(get_leaf(params, path))

    # Programs that also compute gradients are fused differently; see the next test for the forward.
    tolerance = 2**-6 if transform == "bf16" else 2e-6
    chex.assert_trees_all_close(y, y_plain, rtol=tolerance, atol=tolerance)
    assert gradient.shape == core.shape and gradient.dtype == jnp.float32
    full = np.asarray(spec.layout.matrix(explicit), np.float64).reshape(-1, spec.d_in, spec.d_out)
    want = np.einsum("lis,lio,lot->lst", dense64(p), full, dense64(q)).reshape(core.shape)
    # In bf16 both sides are rounded on their way; 2^-8 is one rounding.
    relative = 8 * 2**-8 if transform == "bf16" else 1e-5
    assert np.linalg.norm(gradient - want) <= relative * np.linalg.norm(want)


@pytest.mark.parametrize("block", [DenseBlock, EinsumOutBlock])
def test_the_forward_pass_keeps_its_bits(block):
    model, params, x, kernels = setup(block, "scan")
    ((path, spec),) = kernels.items()
    p, q = projectors(spec, seed=1)
    core = jnp.zeros((*spec.stack_shape, p.size, q.size))
    box = SubspaceKernel(get_leaf(params, path), p, core, q, spec.layout)
    forward = jax.jit(lambda params: intercept(model.apply)({"params": params}, x))
    chex.assert_trees_all_equal(forward(set_leaves(params, {path: box})), forward(params))


@pytest.mark.parametrize("block", [DenseGeneralOutBlock, HeadBlock])
def test_without_interception_the_gradient_is_the_same(block):
    model, params, x, kernels = setup(block, "scan_remat")
    ((path, spec),) = kernels.items()
    p, q = projectors(spec, seed=1)

    def loss(apply, core):
        box = SubspaceKernel(get_leaf(params, path), p, core, q, spec.layout)
        return jnp.sum(jnp.sin(apply({"params": set_leaves(params, {path: box})}, x)))

    core = jnp.zeros((*spec.stack_shape, p.size, q.size))
    fast = jax.jit(jax.grad(lambda core: loss(intercept(model.apply), core)))(core)
    slow = jax.jit(jax.grad(lambda core: loss(model.apply, core)))(core)
    chex.assert_trees_all_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_unboxed_is_the_base_and_the_core_lifted():
    p, q = make_projector(0, 6, 4, 2), make_projector(1, 5, 3, 2)
    base, core = np.arange(30.0).reshape(6, 5), np.arange(12.0).reshape(4, 3)
    box = SubspaceKernel(jnp.asarray(base, jnp.float32), p, jnp.asarray(core, jnp.float32), q)
    want = base + dense64(p)[0] @ core @ dense64(q)[0].T
    np.testing.assert_allclose(materialize({"kernel": box})["kernel"], want, rtol=1e-5)
