"""NNX models: the functional view against the module itself, and the whole story on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from emloc_jax.adapters import attach, correct, init_adapters, merge
from emloc_jax.emulator import calibrate, compress
from emloc_jax.errors import ConfigError, UnsupportedKernelError
from emloc_jax.kernels import LowRankKernel, find_kernels, intercept, materialize, set_leaves
from emloc_jax.nnx import functional, with_params
from emloc_jax.training import init_state, make_train_step


class Own(nnx.Module):
    """A layer that no library knows."""

    def __init__(self, size, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (size, size)) / size**0.5)

    def __call__(self, x):
        return x @ self.weight[...]


class Net(nnx.Module):
    """Tokens to logits with most kinds of layers, a list of them, a shared one, a tied head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 12, rngs=rngs)
        self.conv = nnx.Conv(12, 12, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(12, 12, rngs=rngs) for _ in range(2)])
        self.again = self.layers[0]
        self.mix = nnx.Einsum("bti,io->bto", (12, 8), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.own = Own(8, rngs)
        self.out = nnx.LinearGeneral(8, (4, 3), rngs=rngs)

    def hidden(self, tokens):
        x = self.embed(tokens)
        x = x + self.conv(x) + self.attention(x)
        for layer in (*self.layers, self.again):
            x = x + nnx.gelu(layer(x))
        return x

    def __call__(self, tokens):
        x = self.hidden(tokens)
        y = self.out(self.own(self.norm(self.mix(x))))
        return y.reshape(*tokens.shape, 12), self.embed.attend(x)


TOKENS = jnp.arange(14).reshape(2, 7) % 11


@pytest.fixture
def model():
    net = Net(nnx.Rngs(0))
    net.eval()
    return net


def equal(ours, theirs, tolerance=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5), ours, theirs
    )


def test_the_functional_view_is_the_module(model):
    before = nnx.state(model)
    apply, params = functional(model)
    equal(jax.jit(apply)({"params": params}, TOKENS), model(TOKENS))
    equal(apply({"params": params}, TOKENS, method="hidden"), model.hidden(TOKENS))
    assert type(model.layers[0]) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_kernels_are_found_with_the_reason_where_there_is_no_fast_path(model):
    apply, params = functional(model)
    kernels = find_kernels(apply, params, TOKENS)
    handlers = {path: spec.handler for path, spec in kernels.items()}
    assert handlers == {
        "attention/key/kernel": "DenseGeneral",
        "attention/out/kernel": "DenseGeneral",
        "attention/query/kernel": "DenseGeneral",
        "attention/value/kernel": "DenseGeneral",
        "again/kernel": "Dense",  # the shared layer goes by its first name
        "conv/kernel": "Conv",
        "embed/embedding": "Embed",
        "layers/1/kernel": "Dense",
        "mix/kernel": "Einsum",
        "out/kernel": "DenseGeneral",
        "own/weight": None,
    }
    assert "no handler" in kernels["own/weight"].reason
    group = kernels["attention/key/kernel"].input_group
    assert {p for p, s in kernels.items() if s.input_group == group} == {
        f"attention/{name}/kernel" for name in ("key", "query", "value")
    }


def test_boxes_compute_what_their_product_does(model):
    apply, params = functional(model)
    keys = iter(jax.random.split(jax.random.key(1), 40))
    boxes = {}
    for path, spec in find_kernels(apply, params, TOKENS).items():
        if spec.handler is not None and not spec.tied and spec.module_type != "Conv":
            left = jax.random.normal(next(keys), (spec.d_in, 3))
            right = jax.random.normal(next(keys), (3, spec.d_out)) / 10
            boxes[path] = LowRankKernel(
                left.reshape(*spec.in_shape, 3), right.reshape(3, *spec.out_shape), spec.layout
            )
    boxed = set_leaves(params, boxes)
    fast = intercept(apply)({"params": boxed}, TOKENS)
    module = with_params(model, materialize(boxed))  # computed by NNX alone
    equal(fast, module(TOKENS), 1e-4)
    equal(apply({"params": boxed}, TOKENS), module(TOKENS), 1e-4)


def test_a_boxed_kernel_without_fast_path_is_refused_or_multiplied_out(model):
    apply, params = functional(model)
    box = LowRankKernel(jnp.ones((8, 1)), jnp.ones((1, 8)))
    boxed = set_leaves(params, {"own/weight": box})
    with pytest.raises(UnsupportedKernelError, match="own/weight"):
        intercept(apply)({"params": boxed}, TOKENS)
    allowed = intercept(apply, allow_materialize=True)({"params": boxed}, TOKENS)
    equal(allowed, with_params(model, materialize(boxed))(TOKENS), 1e-4)


def test_the_whole_story(model):
    apply, params = functional(model)
    fast = intercept(apply)
    found = find_kernels(apply, params, TOKENS)
    kernels = {path: s for path, s in found.items() if path.startswith(("again", "layers"))}
    moments = calibrate(apply, params, [TOKENS], kernels=kernels)
    emulator, _ = compress(params, moments, kernels=kernels, ratios=0.5)
    adapters = init_adapters(jax.random.key(0), kernels, where=".*", rank=2, alpha=4)
    target = jax.random.randint(jax.random.key(3), TOKENS.shape, 0, 12)

    def loss(tree, batch):
        logits = fast({"params": tree}, batch["tokens"])[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return losses.sum(), jnp.float32(losses.size)

    tx = optax.adam(1e-2)
    step = make_train_step(loss, tx, combine=lambda a, frozen, key: attach(frozen, a))
    state, losses = init_state(adapters, tx), []
    for _ in range(20):
        state, metrics = step(state, emulator, {"tokens": TOKENS, "targets": target})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
    corrected = correct(state.trainables, params, emulator, limit=1.0)
    tuned = with_params(model, merge(params, corrected))
    equal(fast({"params": attach(params, corrected)}, TOKENS), tuned(TOKENS), 1e-4)
    assert float(jnp.abs(tuned(TOKENS)[0] - model(TOKENS)[0]).max()) > 1e-3


def test_other_trees_are_refused(model):
    apply, params = functional(model)
    with pytest.raises(ConfigError, match=r"missing are \['own/weight'\]"):
        apply({"params": {k: v for k, v in params.items() if k != "own"}}, TOKENS)
    with pytest.raises(ConfigError, match="unknown"):
        with_params(model, {**params, "more": jnp.zeros(3)})
    with pytest.raises(ConfigError, match="shape"):
        with_params(model, set_leaves(params, {"own/weight": jnp.zeros((2, 2))}))
    box = LowRankKernel(jnp.ones((8, 1)), jnp.ones((1, 8)))
    with pytest.raises(ConfigError, match="merge"):
        with_params(model, set_leaves(params, {"own/weight": box}))
