"""Folders that we write load in torch `transformers`, and hold what the base held."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from emloc_jax.adapters import attach, merge
from emloc_jax.checkpoints import load_pretrained, save_pretrained
from emloc_jax.errors import CheckpointError, NonFiniteError, OutputExistsError
from emloc_jax.kernels import get_leaf, set_leaves
from tests.checkpoints.random_adapters import random_adapters
from tests.checkpoints.tiny import FAMILIES, save_tiny, torch_logits


def torch_loads(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_back_loads_in_torch(tmp_path, tokens, family):
    model = save_tiny(tmp_path / "base", family)
    base = load_pretrained(tmp_path / "base", scan_layers=family == "qwen2")
    save_pretrained(tmp_path / "out", base.params, like=base)
    again = torch_loads(tmp_path / "out")
    assert np.array_equal(torch_logits(again, tokens), torch_logits(model, tokens))


def test_saved_back_is_the_base_bit_for_bit(tmp_path):
    save_tiny(tmp_path / "base", "qwen2", torch.bfloat16, shard="4KB")
    (tmp_path / "base" / "LICENSE").write_text("free")
    (tmp_path / "base" / "modeling_evil.py").write_text("raise SystemExit")
    base = load_pretrained(tmp_path / "base", dtype="float32")
    save_pretrained(tmp_path / "out", base.params, like=base)
    names = {p.name for p in (tmp_path / "base").iterdir()} - {"modeling_evil.py"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    for name in names:
        ours, theirs = ((tmp_path / side / name) for side in ("out", "base"))
        if name.endswith(".safetensors"):
            ours, theirs = load_file(ours), load_file(theirs)
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor)
        elif name.endswith("index.json"):
            read = [json.loads(file.read_text())["weight_map"] for file in (ours, theirs)]
            assert read[0] == read[1]
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_a_tied_head_is_not_written_twice(tmp_path):
    save_tiny(tmp_path / "base", "smollm2")
    base = load_pretrained(tmp_path / "base")
    save_pretrained(tmp_path / "out", base.params, like=base)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_merged_and_attached_adapters_give_our_logits_in_torch(tmp_path, tokens, scan_layers):
    save_tiny(tmp_path / "base", "qwen2_tied")
    base = load_pretrained(tmp_path / "base", scan_layers=scan_layers)
    adapters = random_adapters(base, rank=3, alpha=7.0, rslora=True)
    merged = merge(base.params, adapters)
    ours = np.asarray(jax.jit(base.model.apply)({"params": merged}, jnp.asarray(tokens)))
    save_pretrained(tmp_path / "merged", merged, like=base)
    save_pretrained(tmp_path / "attached", attach(base.params, adapters), like=base)
    theirs = torch_logits(torch_loads(tmp_path / "merged"), tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    before = torch_logits(torch_loads(tmp_path / "base"), tokens)
    assert np.abs(theirs - before).max() > 0.01
    first, second = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "attached")
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_another_dtype_is_written_and_told(tmp_path, tokens, llama_folder):
    base = load_pretrained(llama_folder)
    save_pretrained(tmp_path / "out", base.params, like=base, dtype="bfloat16")
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_refuses_what_is_no_model(tmp_path, llama_folder):
    base = load_pretrained(llama_folder)
    norm = {"scale": jnp.ones(17)}
    cases = {
        "missing: norm/scale": {k: v for k, v in base.params.items() if k != "norm"},
        "unexpected: other/scale": base.params | {"other": norm},
        "wrong shape: norm/scale": base.params | {"norm": norm},
    }
    for message, params in cases.items():
        with pytest.raises(CheckpointError, match=message):
            save_pretrained(tmp_path / "out", params, like=base)
    path = "layers/1/mlp/up_proj/kernel"
    broken = get_leaf(base.params, path).at[3, 4].set(jnp.nan)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        save_pretrained(tmp_path / "out", set_leaves(base.params, {path: broken}), like=base)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_existing_folder_is_not_touched(tmp_path, llama_folder):
    base = load_pretrained(llama_folder)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in llama_folder.iterdir()}
    with pytest.raises(OutputExistsError):
        save_pretrained(llama_folder, base.params, like=base)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in llama_folder.iterdir()} == before


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_leaves_nothing(tmp_path, llama_folder, monkeypatch, when):
    base = load_pretrained(llama_folder)
    if when == "before":
        import shutil

        monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(9, 8, 1))
    else:
        import os

        def fsync(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="bytes are needed"):
        save_pretrained(tmp_path / "out", base.params, like=base)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
