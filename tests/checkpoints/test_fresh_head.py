"""A classification head on an encoder without one: asked for, told, saved, and read by torch."""

import json
import logging

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emloc_jax.checkpoints import load_pretrained, save_adapter, save_pretrained
from emloc_jax.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    UnsupportedArchitectureError,
)
from tests.checkpoints.random_adapters import random_adapters
from tests.checkpoints.tiny import save_tiny
from tests.models.torch_families import torch_model

TOKENS = np.random.default_rng(0).integers(5, 53, (2, 9), dtype=np.int32)
CLASSIFIER = ("classifier/kernel", "classifier/bias")
POOLER = ("pooler/kernel", "pooler/bias")


def drop(folder, start):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "variant, dropped, fresh",
    [
        ("bert", None, CLASSIFIER),
        ("bert", "pooler.", POOLER + CLASSIFIER),
        ("bert-mlm", None, POOLER + CLASSIFIER),
        ("roberta", None, POOLER + CLASSIFIER),  # its pooler is not what the classifier reads
        ("bert-labels", "classifier.", CLASSIFIER),
    ],
)
def test_made_told_saved_and_read_by_torch(tmp_path, caplog, variant, dropped, fresh):
    torch_model(variant).save_pretrained(tmp_path / "base")
    if dropped:
        drop(tmp_path / "base", dropped)
    with caplog.at_level(logging.WARNING):
        base = load_pretrained(tmp_path / "base", num_labels=7, scan_layers=True)
    assert set(base.fresh) == set(fresh) and all(path in caplog.text for path in fresh)
    assert base.config.num_labels == 7 and base.params["classifier"]["kernel"].shape == (24, 7)
    save_pretrained(tmp_path / "out", base.params, like=base)

    kind = transformers.AutoModelForSequenceClassification
    model, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_labels == 7
    with torch.no_grad():
        theirs = model.eval()(torch.asarray(TOKENS).long()).logits.numpy()
    ours = jax.jit(base.model.apply)({"params": base.params}, TOKENS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    again = load_pretrained(tmp_path / "out")
    assert again.fresh == () and again.config == base.config


def test_the_seed_decides_and_the_numbers_are_the_family_s(tmp_path):
    torch_model("bert-mlm").save_pretrained(tmp_path)
    one, same, other = (
        load_pretrained(tmp_path, num_labels=200, seed=seed).params for seed in (1, 1, 2)
    )
    for path in ("pooler", "classifier"):
        kernel = one[path]["kernel"]
        assert np.array_equal(kernel, same[path]["kernel"])
        assert not np.array_equal(kernel, other[path]["kernel"])
        assert not np.any(one[path]["bias"])
        np.testing.assert_allclose(np.std(kernel), 0.3, rtol=0.1)  # its initializer_range
    shapes = load_pretrained(tmp_path, num_labels=200, abstract=True, dtype="bfloat16").params
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(np.shape, one)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("bfloat16")}


def test_a_missing_head_is_refused_unless_asked_for(tmp_path):
    torch_model("roberta-labels").save_pretrained(tmp_path)
    drop(tmp_path, "classifier.")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(tmp_path)
    for words in ("missing: classifier.out_proj.weight (3, 24)", "num_labels=…"):
        assert words in str(caught.value)


def test_half_a_head_is_no_missing_head(tmp_path):
    torch_model("bert-labels").save_pretrained(tmp_path)
    drop(tmp_path, "classifier.bias")
    with pytest.raises(CheckpointError, match="missing: classifier.bias"):
        load_pretrained(tmp_path, num_labels=5)


def test_a_head_of_another_size_is_not_replaced(tmp_path):
    torch_model("bert-labels").save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, num_labels=5).fresh == ()
    with pytest.raises(CheckpointError, match="num_labels=7 .* classifier of 5 labels"):
        load_pretrained(tmp_path, num_labels=7)


def test_impossible_requests(tmp_path):
    save_tiny(tmp_path / "llama")
    with pytest.raises(UnsupportedArchitectureError, match="llama.*no classification head"):
        load_pretrained(tmp_path / "llama", num_labels=3)
    torch_model("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="num_labels=0"):
        load_pretrained(tmp_path / "bert", num_labels=0)


def test_labels_keep_their_names_and_the_dtype_is_told(tmp_path):
    torch_model("bert").save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", num_labels=2, dtype="bfloat16")
    save_pretrained(tmp_path / "out", base.params, like=base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert config["dtype"] == "bfloat16" and {t.dtype for t in stored} == {torch.bfloat16}


def test_an_adapter_must_bring_the_head_that_its_base_lacks(tmp_path):
    torch_model("bert").save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", num_labels=3)
    adapters = random_adapters(base, rank=2, alpha=4.0)
    with pytest.raises(AdapterMismatchError, match="(?s)kernel: missing.*made afresh.*init_whole"):
        save_adapter(tmp_path / "adapter", adapters, base=base)
