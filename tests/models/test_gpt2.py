"""GPT-2 against torch: names, logits, packing, generation; and in every form of its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from emloc_jax.errors import ConfigError, DataError, UnsupportedArchitectureError
from emloc_jax.kernels import LowRankKernel, find_kernels, intercept
from emloc_jax.models import (
    Gpt2,
    Gpt2Config,
    block_stack,
    generate,
    hf_storage,
    hf_tensor_names,
    model_from_hf,
    stack_layers,
    unstack_layers,
)
from tests.models.torch_families import our_config, our_params, torch_model, torch_outputs

HF = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 53}
HF |= {"n_embd": 24, "n_layer": 2, "n_head": 3}
both = pytest.mark.parametrize("variant", ["gpt2", "gpt2-untied"])
SEGMENTS = (np.arange(12) < np.array([[12], [7], [2]])).astype(np.int32)


def tokens(rows=3, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, 53, (rows, length), dtype=np.int32)


@both
def test_names_are_torch_s_own_and_cover_the_tree(variant):
    config = our_config(variant)
    state = {name: tuple(t.shape) for name, t in torch_model(variant).state_dict().items()}
    for copy in hf_storage(config).copies:
        del state[copy]
    assert {t.name: t.shape for t in hf_tensor_names(config).values()} == state
    tree = jax.eval_shape(Gpt2(config).init, jax.random.key(0), tokens())["params"]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(np.shape, our_params(variant))


@both
def test_logits_of_padded_rows(variant):
    model = model_from_hf(torch_model(variant).config.to_dict())
    logits = jax.jit(model.apply)({"params": our_params(variant)}, tokens(), None, SEGMENTS)
    expected = torch_outputs(variant, tokens(), attention_mask=SEGMENTS).logits.numpy()
    real = SEGMENTS.astype(bool)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)
    assert np.isfinite(logits).all()


def test_packed_segments_are_separate_rows():
    lengths, row = (7, 4, 1), tokens(1)
    segments = np.repeat([1, 2, 0], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    apply = jax.jit(Gpt2(our_config("gpt2")).apply)
    logits = apply({"params": our_params("gpt2")}, row, positions, segments)
    for segment in (1, 2):
        own = segments[0] == segment
        expected = torch_outputs("gpt2", row[:, own]).logits[0].numpy()
        np.testing.assert_allclose(logits[0, own], expected, atol=1e-4)


@both
def test_greedy_generation(variant):
    """Prompts of different length, up to the last learned position."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 53, length).tolist() for length in (3, 14, 7)]
    expected = [
        torch_model(variant)
        .generate(
            torch.asarray([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :]
        .tolist()
        for prompt in prompts
    ]
    model, params = Gpt2(our_config(variant), scan_layers=True), our_params(variant)
    ours = generate(model, stack_layers(params, 2), prompts, max_new_tokens=10, pad_to=4)
    assert ours == expected
    with pytest.raises(DataError, match="context holds 24"):
        generate(model, params, prompts, max_new_tokens=11)


def test_scanned_rematerialised_and_block_by_block_equal_plain():
    params, stacked = our_params("gpt2"), stack_layers(our_params("gpt2"), 2)

    def loss_and_gradient(model, params):
        def loss(params):
            logits = model.apply({"params": params}, tokens(), None, SEGMENTS)
            return jnp.sum(jnp.where(SEGMENTS[..., None] > 0, logits, 0.0) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradient = loss_and_gradient(Gpt2(our_config("gpt2")), params)
    model = Gpt2(our_config("gpt2"), scan_layers=True, remat=True)
    again, other = loss_and_gradient(model, stacked)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max()),
        unstack_layers(other, 2),
        gradient,
    )
    plain = Gpt2(our_config("gpt2"))
    expected = jax.jit(plain.apply)({"params": params}, tokens(), None, SEGMENTS)
    composed = jax.jit(block_stack(model))(stacked, tokens(), None, SEGMENTS)
    np.testing.assert_allclose(composed, expected, atol=2e-5)


def test_bf16_computes_in_bf16_and_returns_fp32():
    model = Gpt2(our_config("gpt2"), dtype=jnp.bfloat16)
    hidden = jax.eval_shape(
        lambda p, x: model.apply(p, x, method="hidden"), {"params": our_params("gpt2")}, tokens()
    )
    logits = jax.jit(model.apply)({"params": our_params("gpt2")}, tokens())
    exact = torch_outputs("gpt2", tokens()).logits.numpy()  # whole rows, without a mask
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert 1e-4 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 3e-2


@pytest.mark.parametrize("scan", [False, True])
def test_kernels_are_found_and_take_the_fast_path(scan):
    model, params = Gpt2(our_config("gpt2"), scan_layers=scan), our_params("gpt2")
    params = stack_layers(params, 2) if scan else params
    kernels = find_kernels(model.apply, params, tokens())
    assert len(kernels) == (4 if scan else 8) + 1 and kernels["embed_tokens/embedding"].tied
    assert all(spec.handler is not None for spec in kernels.values())

    def factor(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        u, s, vt = np.linalg.svd(leaf, full_matrices=False)
        left, right = u[..., :9] * s[..., None, :9], vt[..., :9, :]
        return LowRankKernel(jnp.asarray(left), jnp.asarray(right))

    factored = jax.tree_util.tree_map_with_path(factor, params)
    slow = jax.jit(model.apply)({"params": factored}, tokens())
    fast = jax.jit(intercept(model.apply))({"params": factored}, tokens())
    np.testing.assert_allclose(fast, slow, atol=5e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"),
        (dict(scale_attn_weights=False), "scale_attn_weights=False"),
        (dict(add_cross_attention=True), "add_cross_attention=True"),
        (dict(activation_function="mish"), "'mish'"),
        (dict(quantization_config=dict(quant_method="gptq")), "gptq"),
        (dict(architectures=["GPT2ForSequenceClassification"]), "GPT2LMHeadModel"),
    ],
)
def test_unimplemented_options_are_refused_by_name(changes, words):
    with pytest.raises(UnsupportedArchitectureError, match=words):
        Gpt2Config.from_hf(HF | changes)


@pytest.mark.parametrize(
    "changes, words",
    [(dict(n_embd=None), "'n_embd'"), (dict(n_head=5), "num_heads=5"), (dict(n_inner=0), "=0")],
)
def test_impossible_values_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Gpt2Config.from_hf(HF | changes)


def test_there_and_back():
    for changes in ({}, dict(n_inner=40, tie_word_embeddings=False, eos_token_id=[1, 2])):
        config = Gpt2Config.from_hf(HF | changes)
        assert Gpt2Config.from_hf(config.to_hf()) == config and isinstance(hash(config), int)


def test_rows_longer_than_the_context_are_refused():
    model = Gpt2(our_config("gpt2"))
    with pytest.raises(DataError, match="25 tokens.*24 positions"):
        model.apply({"params": our_params("gpt2")}, tokens(1, 25))
