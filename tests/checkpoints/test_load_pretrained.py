"""Checkpoints saved by torch `transformers`, loaded by us: the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from emloc_jax.checkpoints import load_pretrained
from emloc_jax.errors import ConfigError
from tests.checkpoints.tiny import FAMILIES, save_tiny, torch_logits


def logits(pretrained, tokens):
    apply = jax.jit(pretrained.model.apply)
    return np.asarray(apply({"params": pretrained.params}, jnp.asarray(tokens)))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_torch(tmp_path, tokens, family):
    model = save_tiny(tmp_path, family)
    pretrained = load_pretrained(tmp_path)
    assert pretrained.tokenizer is None
    np.testing.assert_allclose(
        logits(pretrained, tokens), torch_logits(model, tokens), rtol=0, atol=1e-4
    )


def test_sharded_bf16_scanned_equals_single_unrolled(tmp_path, tokens):
    save_tiny(tmp_path / "one", "qwen2", torch.bfloat16)
    save_tiny(tmp_path / "many", "qwen2", torch.bfloat16, shard="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    one = load_pretrained(tmp_path / "one")
    many = load_pretrained(tmp_path / "many", scan_layers=True)
    assert one.params["norm"]["scale"].dtype == jnp.bfloat16
    kernel = many.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (2, 16, 24) and kernel.dtype == jnp.bfloat16
    assert np.array_equal(kernel[1], one.params["layers"]["1"]["mlp"]["up_proj"]["kernel"])
    np.testing.assert_allclose(logits(one, tokens), logits(many, tokens), rtol=0, atol=1e-5)


def test_dtype_override(llama_folder):
    params = load_pretrained(llama_folder, dtype="bfloat16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ConfigError, match="int8"):
        load_pretrained(llama_folder, dtype="int8")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_abstract_has_the_shapes_and_dtypes_of_the_model(llama_folder, scan_layers):
    pretrained = load_pretrained(llama_folder, abstract=True, scan_layers=scan_layers)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(pretrained.model.init, jax.random.key(0), token)["params"]
    assert jax.tree.structure(pretrained.params) == jax.tree.structure(wanted)
    assert jax.tree.leaves(pretrained.params) == jax.tree.leaves(wanted)


def test_ignores_the_two_documented_extras(tmp_path, tokens):
    """Rotary buffers of old checkpoints, and a copied head in a tied model."""
    from safetensors.torch import load_file, save_file

    model = save_tiny(tmp_path, "smollm2")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    np.testing.assert_allclose(
        logits(load_pretrained(tmp_path), tokens), torch_logits(model, tokens), rtol=0, atol=1e-4
    )


def test_tokenizer_of_a_folder(llama_folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(llama_folder)
    assert load_pretrained(llama_folder).tokenizer("b a")["input_ids"] == [1, 0]
    assert load_pretrained(llama_folder, tokenizer=False).tokenizer is None
