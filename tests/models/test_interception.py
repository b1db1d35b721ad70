"""The decoder under `kernels`: every projection is found, and factors are never multiplied out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.kernels import LowRankKernel, find_kernels, intercept
from emloc_jax.models import Decoder, block_stack, generate, stack_layers
from tests.models.tiny import CONFIG, tokens, unrolled_params


def factored(params, rank=5):
    def factor(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        u, s, vt = np.linalg.svd(leaf, full_matrices=False)
        left, right = u[..., :rank] * s[..., None, :rank], vt[..., :rank, :]
        return LowRankKernel(jnp.asarray(left), jnp.asarray(right))

    return jax.tree_util.tree_map_with_path(factor, params)


@pytest.mark.parametrize("scan", [False, True])
def test_projections_are_found_with_their_shared_inputs(scan):
    model = Decoder(dataclasses.replace(CONFIG, tie_embeddings=True), scan_layers=scan)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens())["params"]
    kernels = find_kernels(model.apply, params, tokens())
    assert len(kernels) == (7 if scan else 14) + 1
    assert all(spec.handler is not None for spec in kernels.values())
    prefix = "layers" if scan else "layers/1"

    def groups(*names):
        return {kernels[f"{prefix}/{name}_proj/kernel"].input_group for name in names}

    assert len(groups("self_attn/q", "self_attn/k", "self_attn/v")) == 1
    assert len(groups("mlp/gate", "mlp/up")) == 1
    assert len(groups("self_attn/q", "self_attn/o", "mlp/up", "mlp/down")) == 4


def test_fast_and_slow_path_agree():
    model = Decoder(CONFIG, scan_layers=True)
    params = factored(stack_layers(unrolled_params(), 2))
    slow = jax.jit(model.apply)({"params": params}, tokens())
    fast = intercept(model.apply)
    np.testing.assert_allclose(jax.jit(fast)({"params": params}, tokens()), slow, atol=2e-5)
    stack = block_stack(model, wrap=intercept)
    np.testing.assert_allclose(jax.jit(stack)(params, tokens()), slow, atol=2e-5)
    settings = dict(max_new_tokens=6, pad_to=8)
    prompts = [[1, 2, 3], [4]]
    assert generate(model, params, prompts, apply=fast, **settings) == generate(
        model, params, prompts, **settings
    )
