"""Train on an emulator, choose a limit, correct, attach and merge: on one small linen model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.adapters import attach, choose_limit, correct, init_adapters, merge
from emloc_jax.kernels import LowRankKernel, find_kernels, flatten_leaves, intercept, set_leaves

WIDTH = 12


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        heads = nn.Einsum((WIDTH, 3, 4), "bd,dhk->bhk", name="split")(x)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join")(jnp.tanh(heads))
        return x + nn.Dense(WIDTH, name="mix", bias_init=nn.initializers.normal(1.0))(x), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(17, WIDTH, name="embed")
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        layers = nn.scan(nn.remat(Block), length=2, **axes)
        return embed.attend(layers(name="layers")(embed(tokens), None)[0])


@pytest.fixture(scope="module")
def story():
    model, tokens = Model(), jnp.arange(16) % 17
    params = model.init(jax.random.key(0), tokens)["params"]
    kernels = find_kernels(model.apply, params, tokens)
    targets = [path for path in kernels if path.startswith("layers")]
    assert len(targets) == 3
    emulator = set_leaves(params, {path: truncated(params, kernels[path]) for path in targets})
    adapters = init_adapters(jax.random.key(1), kernels, where="layers/.*", rank=3, alpha=6)
    apply = intercept(model.apply)

    def loss(params, batch):
        logits = apply({"params": params}, batch)
        losses = -jax.nn.log_softmax(logits)[jnp.arange(batch.size), (batch * 5 + 1) % 17]
        return losses.sum(), batch.size

    @jax.jit
    def step(adapters, key):
        def objective(adapters):
            total, weight = loss(attach(emulator, adapters, dropout=0.1, key=key), tokens)
            return total / weight

        value, gradient = jax.value_and_grad(objective)(adapters)
        return jax.tree.map(lambda x, g: x - 0.3 * g, adapters, gradient), value

    values = []
    for key in jax.random.split(jax.random.key(2), 40):
        adapters, value = step(adapters, key)
        values.append(float(value))
    assert step._cache_size() == 1 and values[-1] < 0.7 * values[0]
    return model, apply, params, emulator, adapters, loss, tokens


def truncated(params, spec):
    """The two largest singular values of every layer's kernel."""
    leaf = flatten_leaves(params)[spec.path]
    u, s, vt = np.linalg.svd(np.asarray(spec.layout.matrix(leaf)), full_matrices=False)
    left, right = u[..., :2] * s[..., None, :2], vt[..., :2, :]
    stack = spec.stack_shape
    return LowRankKernel(
        jnp.asarray(left.reshape(*stack, *spec.in_shape, 2)),
        jnp.asarray(right.reshape(*stack, 2, *spec.out_shape)),
        spec.layout,
    )


def test_corrected_adapters_attach_and_merge_alike(story):
    model, apply, params, emulator, adapters, _, tokens = story
    corrected = correct(adapters, params, emulator, limit=1.0)
    fast = jax.jit(lambda params: apply({"params": params}, tokens))(attach(params, corrected))
    plain = model.apply({"params": attach(params, corrected)}, tokens)
    merged = model.apply({"params": merge(params, corrected)}, tokens)
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fast, merged, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(merge(params, corrected)) == jax.tree.structure(params)


def test_the_chosen_limit_is_what_the_corrected_model_has(story):
    _, _, params, emulator, adapters, loss, tokens = story
    limit, table = choose_limit(adapters, params, emulator, loss, [tokens])
    assert table[limit] <= table[0.0]
    corrected = correct(adapters, params, emulator, limit=limit)
    total, weight = loss(attach(params, corrected), tokens)
    assert float(total) / weight == pytest.approx(table[limit], rel=1e-4)


def test_a_full_rank_emulator_needs_no_correction(story):
    model, apply, params, _, adapters, _, tokens = story
    same = correct(adapters, params, params, limit=3.0)
    expected = apply({"params": attach(params, adapters)}, tokens)
    np.testing.assert_allclose(
        apply({"params": attach(params, same)}, tokens), expected, rtol=1e-4, atol=1e-5
    )
