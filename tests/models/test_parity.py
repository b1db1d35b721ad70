"""Against torch transformers on every architecture: keys, logits, greedy generation."""

import jax
import numpy as np
import pytest
import torch

from emloc_jax.models import Decoder, generate, hf_tensor_names, stack_layers
from tests.models.torch_reference import (
    VARIANTS,
    our_config,
    our_params,
    torch_logits,
    torch_model,
)

LENGTH = 24  # beyond the window of mistral-window and the original context of llama3.1
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def _tokens(rows=3, length=LENGTH):
    return np.random.default_rng(0).integers(0, 61, (rows, length), dtype=np.int32)


@every_variant
def test_names_are_torch_s_own(variant):
    state = torch_model(variant).state_dict()
    names = {tensor.name: tensor.shape for tensor in hf_tensor_names(our_config(variant)).values()}
    if our_config(variant).tie_embeddings:
        state.pop("lm_head.weight")
    assert names == {name: tuple(tensor.shape) for name, tensor in state.items()}


@every_variant
def test_names_cover_the_parameter_tree(variant):
    tree = jax.eval_shape(Decoder(our_config(variant)).init, jax.random.key(0), _tokens(1, 2))
    ours = jax.tree.map(lambda leaf: leaf.shape, tree["params"])
    assert ours == jax.tree.map(lambda leaf: leaf.shape, our_params(variant))


@every_variant
def test_logits(variant):
    """Rows of different length, padded on the right."""
    tokens = _tokens()
    segments = (np.arange(LENGTH) < np.array([[LENGTH], [17], [3]])).astype(np.int32)
    apply = jax.jit(Decoder(our_config(variant)).apply)
    logits = apply({"params": our_params(variant)}, tokens, None, segments)
    expected = torch_logits(variant, tokens, torch.asarray(segments))
    real = segments.astype(bool)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("variant", ["llama2", "smollm2", "mistral-window", "qwen3-biases"])
def test_logits_without_a_mask(variant):
    """Whole rows; causality and window are said in words then."""
    model, params = Decoder(our_config(variant), scan_layers=True), our_params(variant)
    logits = jax.jit(model.apply)({"params": stack_layers(params, 2)}, _tokens())
    np.testing.assert_allclose(logits, torch_logits(variant, _tokens()), atol=1e-4)


@pytest.mark.parametrize("variant", ["llama3.1", "mistral-window", "qwen3"])
def test_packed_segments_are_separate_rows(variant):
    tokens = _tokens(1)
    segments = np.repeat([1, 2, 3, 0], [9, 11, 2, 2])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (9, 11, 2, 2)])[None].astype(np.int32)
    apply = jax.jit(Decoder(our_config(variant)).apply)
    logits = apply({"params": our_params(variant)}, tokens, positions, segments)
    for segment in (1, 2, 3):
        own = segments[0] == segment
        expected = torch_logits(variant, tokens[:, own])
        np.testing.assert_allclose(logits[0, own], expected[0], atol=1e-4)


@every_variant
def test_greedy_generation(variant):
    """Prompts of different length; the window and both rope scalings are passed on the way."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 61, length).tolist() for length in (3, 11, 7)]
    width = max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    expected = torch_model(variant).generate(
        torch.asarray(padded),
        attention_mask=torch.asarray(mask),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    ours = generate(
        Decoder(our_config(variant), scan_layers=True),
        stack_layers(our_params(variant), 2),
        prompts,
        max_new_tokens=12,
        pad_to=4,
    )
    assert ours == expected[:, width:].tolist()
