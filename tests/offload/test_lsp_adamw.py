"""What `lsp_adamw` computes, against Optax and against the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from emloc_jax.kernels import dense_projector, find_kernels
from emloc_jax.offload._lsp_adamw import lsp_adamw
from tests.offload.gradients import dense
from tests.offload.lsp_case import KERNELS, QUICK, close, identities, random_tree, spec, stepper


@pytest.mark.parametrize("seed", [None, 3])
def test_identity_projectors_are_adamw(seed):
    """20 steps in fp32 with schedule, decay of some leaves, and clipping at every step."""
    rate = optax.cosine_decay_schedule(1e-2, 20)
    mask = {"layers": {"up": {"kernel": True}}, "mix": {"kernel": False}, "bias": True}
    numbers = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
    tx = lsp_adamw(
        rate, kernels=KERNELS, where=".*", subspace=1.0, nnz=1, projectors=identities(seed),
        clip=3.0, refit_every=7, decay_mask=mask, **numbers,
    )  # fmt: skip
    reference = optax.chain(optax.clip_by_global_norm(3.0), optax.adamw(rate, mask=mask, **numbers))
    params = expected = random_tree(0)
    state, other, traces = tx.init(params), reference.init(params), []
    step, reference_step = stepper(tx, traces), stepper(reference)
    for i in range(20):
        grads = random_tree(i + 1, scale=0.1 * (i + 3))
        params, state = step(grads, state, params)
        expected, other = reference_step(grads, other, expected)
        close(params, expected, 1e-6)
    assert len(traces) == 1 and int(state.count) == 20 and int(state.skipped) == 0
    assert all(np.all(error < 2e-3) for error in state.errors.values())


def test_uncompressed_sides_are_adamw_too():
    pairs = dict.fromkeys(KERNELS, (None, None))
    tx = lsp_adamw(1e-2, kernels=KERNELS, where=".*", subspace=1.0, projectors=pairs)
    params = random_tree(0)
    updates, state = jax.jit(tx.update)(random_tree(1), tx.init(params), params)
    reference = optax.adamw(1e-2, weight_decay=0.0)
    close(updates, reference.update(random_tree(1), reference.init(params), params)[0], 1e-7)
    assert state.moments["mix/kernel"].mu.shape == (12, 10)


def test_orthonormal_projectors_are_adam_in_a_rotated_basis():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (12, 10))
    pairs = {"w": tuple(dense_projector(m.astype(np.float32)) for m in (left, right))}
    r, s = (dense(p) for p in pairs["w"])
    kernels = {"w": spec("w", (12,), (10,))}
    tx = lsp_adamw(1e-3, kernels=kernels, where="w", subspace=1.0, projectors=pairs)
    params = {"w": jnp.zeros((12, 10))}
    state, step = tx.init(params), stepper(tx)
    mu = nu = expected = np.zeros((12, 10))
    for t in range(1, 11):
        g = rng.standard_normal((12, 10)).astype(np.float32)
        params, state = step({"w": jnp.asarray(g)}, state, params)
        rotated = r.T @ g @ s
        mu, nu = 0.9 * mu + 0.1 * rotated, 0.999 * nu + 0.001 * rotated**2
        direction = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        expected = expected - 1e-3 * r @ direction @ s.T
    np.testing.assert_allclose(params["w"], expected, rtol=0, atol=1e-6)


def test_a_scanned_model_in_the_users_own_loop():
    """Real gradients of a linen model, a `lax.scan` over steps; the loss falls."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(8)(jnp.tanh(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True},
                            length=2)  # fmt: skip
            return nn.DenseGeneral((2, 2))(stack(name="layers")(x, None)[0])

    model, x = Model(), jax.random.normal(jax.random.key(0), (16, 8))
    params = model.init(jax.random.key(1), x)["params"]
    kernels = find_kernels(model.apply, params, x)
    target = jnp.roll(x, 1, axis=0)[:, :4].reshape(16, 2, 2)
    tx = lsp_adamw(3e-2, kernels=kernels, where=".*", subspace=0.5, nnz=2, fit=QUICK,
                   refit_every=10)  # fmt: skip

    def loss(params):
        return jnp.mean((model.apply({"params": params}, x) - target) ** 2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, length=30)

    (_, state), losses = train(params)
    assert losses[-1] < 0.6 * losses[0]
    assert state.moments["layers/Dense_0/kernel"].mu.shape == (2, 4, 4)
    assert state.projectors["layers/Dense_0/kernel"][0].stack_shape == (2,)
    assert not np.array_equal(*state.projectors["layers/Dense_0/kernel"][0].indices)
    assert all(np.all(fitted) for fitted in state.fitted.values())
