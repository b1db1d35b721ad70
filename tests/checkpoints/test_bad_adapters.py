"""Adapters that are damaged, of another kind or of another base are refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emloc_jax.adapters import Adapter
from emloc_jax.checkpoints import load_adapter, load_pretrained, save_adapter
from emloc_jax.errors import (
    AdapterMismatchError,
    CheckpointError,
    NonFiniteError,
    OutputExistsError,
)
from tests.checkpoints.tiny import save_tiny

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter(d_in=16, d_out=16, rank=2, **options):
    return Adapter(jnp.ones((d_in, rank)), jnp.ones((rank, d_out)), alpha=4.0, **options)


@pytest.fixture
def base(llama_folder):
    return load_pretrained(llama_folder)


@pytest.fixture
def folder(tmp_path, base):
    adapters = {f"layers/{i}/self_attn/q_proj/kernel": adapter() for i in (0, 1)}
    return save_adapter(tmp_path / "adapter", adapters, base=base)


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refuses(folder, base, *words, kind=AdapterMismatchError, **options):
    with pytest.raises(kind) as caught:
        load_adapter(folder, base, **options)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["embed_tokens"]},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"an_option_of_next_year": 3},
    ],
    ids=lambda option: next(iter(option)),
)
def test_other_kinds_are_refused_by_name(folder, base, option):
    change_config(folder, **option)
    refuses(folder, base, next(iter(option)))


def test_config_missing_or_corrupt(folder, base):
    file = folder / "adapter_config.json"
    for text in ("{", "[]", "{}", '{"peft_type": "LORA", "r": "x", "lora_alpha": 1}'):
        file.write_text(text)
        refuses(folder, base, "no PEFT config", kind=CheckpointError)
    file.unlink()
    refuses(folder, base, "no adapter_config.json", kind=CheckpointError)


def test_weights_missing_or_truncated(folder, base):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refuses(folder, base, "no whole safetensors", kind=CheckpointError)
    file.unlink()
    refuses(folder, base, "There is no file", kind=CheckpointError)


def test_factors_that_do_not_fit(folder, base):
    def change(tensors):
        del tensors[f"{Q}.lora_B.weight"]
        tensors[f"{Q.replace('0', '1')}.lora_A.weight"] = np.ones((3, 16), np.float32)
        tensors[f"{Q.replace('0', '9')}.lora_A.weight"] = np.ones((2, 16), np.float32)
        tensors[f"{Q}.lora_magnitude_vector"] = np.ones(16, np.float32)

    change_tensors(folder, change)
    refuses(
        folder,
        base,
        "model.layers.0.self_attn.q_proj: lora_B.weight is missing",
        "model.layers.1.self_attn.q_proj: lora_A is (3, 16), not (2, 16)",
        "the base has no linear layer 'model.layers.9.self_attn.q_proj'",
        "lora_magnitude_vector: not a LoRA factor",
    )


def test_a_replaced_embedding(folder, base):
    """PEFT stores resized or trained embeddings beside the factors; the base's own are harmless."""
    name = "base_model.model.model.embed_tokens.weight"
    own = np.array(base.params["embed_tokens"]["embedding"])
    change_tensors(folder, lambda t: t.update({name: own}))
    assert len(load_adapter(folder, base)) == 2
    change_tensors(folder, lambda t: t.update({name: own + 1}))
    refuses(folder, base, f"{name}: not a LoRA factor")


def test_non_finite_factors(folder, base):
    change_tensors(folder, lambda t: t[f"{Q}.lora_B.weight"].__setitem__((3, 1), np.nan))
    refuses(folder, base, "model.layers.0.self_attn.q_proj", kind=NonFiniteError)


def test_another_base(tmp_path, folder, base):
    save_tiny(tmp_path / "wider", hidden_size=32)
    refuses(folder, load_pretrained(tmp_path / "wider"), "lora_A is (2, 16), not (2, 32)")
    save_tiny(tmp_path / "other", seed=7)
    other = load_pretrained(tmp_path / "other")
    refuses(folder, other, "other weights", str(other.source))
    assert load_adapter(folder, other, check_base=False).keys()
    assert load_adapter(folder, base.config).keys()


def test_stacking_needs_every_layer_alike(tmp_path, base):
    def saved(name, *adapters):
        named = {f"layers/{i}/self_attn/q_proj/kernel": a for i, a in enumerate(adapters)}
        return save_adapter(tmp_path / name, named, base=base)

    refuses(saved("a", adapter()), base, "layer(s) [1]", scan_layers=True)
    refuses(saved("b", adapter(), adapter(rank=3)), base, "differ in rank", scan_layers=True)


def test_saving_what_does_not_fit(tmp_path, base):
    path = "layers/0/self_attn/q_proj/kernel"
    tied = {"embed_tokens/embedding": adapter(16, 48)}
    mixed = {path: adapter(), path.replace("0", "1"): adapter(rslora=True)}
    stacked = {path: jax.tree.map(lambda x: jnp.stack([x, x]), adapter())}
    cases = [
        ({}, "no adapter"),
        ({"head/kernel": adapter()}, "no such linear layer"),
        ({path: adapter(17)}, r"for \(17, 16\), the base has \(16, 16\)"),
        (tied, "tied embedding"),
        (mixed, "rsLoRA"),
        (stacked, "does not fit|no such linear layer"),
    ]
    for adapters, message in cases:
        with pytest.raises(AdapterMismatchError, match=message):
            save_adapter(tmp_path / "out", adapters, base=base)
    broken = {path: jax.tree.map(lambda x: x * jnp.inf, adapter())}
    with pytest.raises(NonFiniteError, match="q_proj"):
        save_adapter(tmp_path / "out", broken, base=base)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_existing_folder_is_not_touched(folder, base):
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(OutputExistsError):
        save_adapter(folder, {"layers/0/mlp/up_proj/kernel": adapter(16, 24)}, base=base)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
