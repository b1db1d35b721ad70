"""BERT and RoBERTa against torch, with every head; and in every form of their layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError, UnsupportedArchitectureError
from emloc_jax.kernels import LowRankKernel, find_kernels, intercept
from emloc_jax.models import (
    Encoder,
    EncoderConfig,
    block_stack,
    hf_storage,
    hf_tensor_names,
    model_from_hf,
    stack_layers,
    unstack_layers,
)
from tests.models.torch_families import (
    VARIANTS,
    our_config,
    our_params,
    torch_model,
    torch_outputs,
)

ENCODERS = [name for name in VARIANTS if not name.startswith("gpt2")]
every_variant = pytest.mark.parametrize("variant", ENCODERS)
LENGTHS = np.array([[12], [7], [3]])
SEGMENTS = (np.arange(12) < LENGTHS).astype(np.int32)
HF = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 53, "hidden_size": 24}
HF |= {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}


def tokens(variant, segments=SEGMENTS):
    """Real tokens of every row, then padding tokens; RoBERTa tells padding by them."""
    words = np.random.default_rng(0).integers(5, 53, segments.shape, dtype=np.int32)
    return np.where(segments > 0, words, our_config(variant).pad_token_id).astype(np.int32)


def token_types(variant):
    high = our_config(variant).type_vocab_size
    return np.random.default_rng(1).integers(0, high, SEGMENTS.shape, dtype=np.int32)


def torch_result(variant, tokens, **inputs):
    outputs = torch_outputs(variant, tokens, **inputs)
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).numpy()


@every_variant
def test_names_are_torch_s_own_and_cover_the_tree(variant):
    config = our_config(variant)
    state = {name: tuple(t.shape) for name, t in torch_model(variant).state_dict().items()}
    for copy in hf_storage(config).copies:
        del state[copy]
    assert {t.name: t.shape for t in hf_tensor_names(config).values()} == state
    tree = jax.eval_shape(Encoder(config).init, jax.random.key(0), tokens(variant))["params"]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(np.shape, our_params(variant))


@every_variant
def test_results_of_padded_rows_with_token_types(variant):
    """Padded on the right, and on the left: RoBERTa alone counts positions past the padding."""
    model = model_from_hf(torch_model(variant).config.to_dict(), scan_layers=True)
    params, types = {"params": stack_layers(our_params(variant), 2)}, token_types(variant)
    apply = jax.jit(model.apply)
    for segments in (SEGMENTS, SEGMENTS[:, ::-1].copy()):
        words = tokens(variant, segments)
        ours = np.asarray(apply(params, words, None, segments, types))
        theirs = torch_result(variant, words, attention_mask=segments, token_type_ids=types)
        assert ours.dtype == np.float32 and np.isfinite(ours).all()
        real = slice(None) if model.config.head == "classification" else segments.astype(bool)
        # On the left, the first token is padding and what a classifier sees there is arbitrary.
        rows = real if segments is SEGMENTS or ours.ndim == 3 else slice(0, 1)
        np.testing.assert_allclose(ours[rows], theirs[rows], atol=1e-4)


@pytest.mark.parametrize("variant", ["bert", "roberta"])
def test_whole_rows_need_no_mask_and_the_pooler_is_torch_s(variant):
    words = tokens(variant, np.ones_like(SEGMENTS))
    model, params = Encoder(our_config(variant)), {"params": our_params(variant)}
    hidden = jax.jit(model.apply)(params, words)
    theirs = torch_outputs(variant, words)
    np.testing.assert_allclose(hidden, theirs.last_hidden_state.numpy(), atol=1e-4)
    pooled = model.apply(params, hidden, method="pool")
    np.testing.assert_allclose(pooled, theirs.pooler_output.numpy(), atol=1e-4)


def test_packed_segments_are_separate_rows():
    words = tokens("roberta-mlm", np.ones_like(SEGMENTS))[:1]
    segments = np.repeat([1, 2, 0], (7, 4, 1))[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (7, 4, 1)])[None].astype(np.int32)
    apply = jax.jit(Encoder(our_config("roberta-mlm")).apply)
    logits = apply({"params": our_params("roberta-mlm")}, words, positions, segments)
    for segment in (1, 2):
        own = segments[0] == segment
        expected = torch_result("roberta-mlm", words[:, own])
        np.testing.assert_allclose(logits[0, own], expected[0], atol=1e-4)


def test_scanned_and_rematerialised_equal_plain():
    inputs = tokens("bert-labels"), None, SEGMENTS, token_types("bert-labels")
    params = our_params("bert-labels")

    def gradient(model, params):
        def loss(params):
            return jnp.sum(jnp.sin(model.apply({"params": params}, *inputs)))

        return jax.jit(jax.grad(loss))(params)

    config = our_config("bert-labels")
    plain = gradient(Encoder(config), params)
    scanned = gradient(Encoder(config, scan_layers=True, remat=True), stack_layers(params, 2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, np.abs(b).max())),
        unstack_layers(scanned, 2),
        plain,
    )


@pytest.mark.parametrize("variant, scan", [("bert-labels", False), ("roberta-mlm", True)])
def test_block_stack_composes_to_the_model(variant, scan):
    model, params = Encoder(our_config(variant), scan_layers=scan), our_params(variant)
    params = stack_layers(params, 2) if scan else params
    inputs = tokens(variant), None, SEGMENTS, token_types(variant)
    expected = jax.jit(model.apply)({"params": params}, *inputs)
    composed = jax.jit(block_stack(model))(params, *inputs)
    np.testing.assert_allclose(composed, expected, atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_kernels_are_found_and_take_the_fast_path(scan):
    model, params = Encoder(our_config("bert-labels"), scan_layers=scan), our_params("bert-labels")
    params, words = stack_layers(params, 2) if scan else params, tokens("bert-labels")
    kernels = find_kernels(model.apply, params, words)
    assert len(kernels) == (6 if scan else 12) + 2
    assert all(spec.handler is not None for spec in kernels.values())
    prefix = "layers" if scan else "layers/1"
    groups = {
        kernels[f"{prefix}/attention/{n}/kernel"].input_group for n in ("query", "key", "value")
    }
    assert len(groups) == 1

    def factor(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        u, s, vt = np.linalg.svd(leaf, full_matrices=False)
        left, right = u[..., :9] * s[..., None, :9], vt[..., :9, :]
        return LowRankKernel(jnp.asarray(left), jnp.asarray(right))

    factored = {"params": jax.tree_util.tree_map_with_path(factor, params)}
    slow = jax.jit(model.apply)(factored, words, None, SEGMENTS)
    fast = jax.jit(intercept(model.apply))(factored, words, None, SEGMENTS)
    np.testing.assert_allclose(fast, slow, atol=5e-5)


def test_the_head_of_a_language_model_is_tied():
    model, params = Encoder(our_config("bert-mlm")), our_params("bert-mlm")
    kernels = find_kernels(model.apply, params, tokens("bert-mlm"))
    assert kernels["embed_tokens/embedding"].tied and "masked_lm/dense/kernel" in kernels


def test_bf16_computes_in_bf16_and_returns_fp32():
    model = Encoder(our_config("bert"), dtype=jnp.bfloat16)
    params = {"params": our_params("bert")}
    hidden = jax.eval_shape(lambda p, x: model.apply(p, x, method="hidden"), params, tokens("bert"))
    ours = jax.jit(model.apply)(params, tokens("bert"), None, SEGMENTS)
    exact = torch_result("bert", tokens("bert"), attention_mask=SEGMENTS)
    real = SEGMENTS.astype(bool)
    difference = np.linalg.norm(ours[real] - exact[real]) / np.linalg.norm(exact[real])
    assert (hidden.dtype, ours.dtype) == (jnp.bfloat16, jnp.float32)
    assert 1e-4 < difference < 3e-2


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
        (dict(is_decoder=True), "is_decoder=True"),
        (dict(add_cross_attention=True), "add_cross_attention=True"),
        (dict(hidden_act="mish"), "'mish'"),
        (dict(pruned_heads={"0": [1]}), "pruned_heads"),
        (dict(architectures=["BertForMaskedLM"], tie_word_embeddings=False), "tie_word_emb"),
        (dict(architectures=["BertForTokenClassification"]), "BertForSequenceClassification"),
        (dict(architectures=["RobertaModel"]), "RobertaModel"),
    ],
)
def test_unimplemented_options_are_refused_by_name(changes, words):
    with pytest.raises(UnsupportedArchitectureError, match=words):
        EncoderConfig.from_hf(HF | changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(vocab_size=None), "'vocab_size'"),
        (dict(num_attention_heads=5), "num_heads=5"),
        (dict(architectures=None, model_type="roberta", pad_token_id=None), "pad_token_id"),
        (dict(max_position_embeddings=0), "max_position_embeddings=0"),
    ],
)
def test_impossible_values_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        EncoderConfig.from_hf(HF | changes)


def test_heads_and_labels_must_agree():
    config = EncoderConfig.from_hf(HF)
    for changes in (dict(num_labels=3), dict(head="masked_lm"), dict(head="classification")):
        with pytest.raises(ConfigError):
            dataclasses.replace(config, **changes)
    with pytest.raises(ConfigError, match="num_labels=0"):
        config.with_labels(0)


@every_variant
def test_there_and_back(variant):
    config = our_config(variant)
    assert EncoderConfig.from_hf(config.to_hf()) == config and isinstance(hash(config), int)


def test_rows_longer_than_the_context_are_refused():
    """RoBERTa's first two rows of the table are not positions: 24 rows hold 22 tokens."""
    model = Encoder(our_config("roberta-mlm"))
    with pytest.raises(DataError, match="23 tokens.*22 positions"):
        model.apply({"params": our_params("roberta-mlm")}, np.zeros((1, 23), np.int32))
