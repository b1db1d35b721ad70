"""Adapters go to torch `peft` and come from it with the same logits."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from emloc_jax.adapters import attach
from emloc_jax.checkpoints import (
    adapter_info,
    base_fingerprint,
    load_adapter,
    load_pretrained,
    save_adapter,
)
from emloc_jax.kernels import intercept
from tests.checkpoints.random_adapters import random_adapters
from tests.checkpoints.tiny import save_tiny, torch_logits

# peft 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

# family, PEFT options
MADE_IN_TORCH = {
    "plain": ("llama", dict(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])),
    "alpha_not_rank": ("llama", dict(r=4, lora_alpha=9, target_modules="all-linear")),
    "rslora": ("llama", dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj"])),
    "biased_base": ("qwen2", dict(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj"])),
    "tied_head": ("smollm2", dict(r=2, lora_alpha=6, target_modules=r".*\.[01]\.mlp\..*_proj")),
    "untied_head": ("qwen2", dict(r=2, lora_alpha=3, target_modules=["lm_head", "o_proj"])),
    "patterns": (
        "llama",
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "up_proj"],
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            alpha_pattern={"v_proj": 3, "layers.1.self_attn.q_proj": 5},
        ),
    ),
}


def our_logits(base, adapters, tokens):
    params = {"params": attach(base.params, adapters)}
    return np.asarray(jax.jit(intercept(base.model.apply))(params, jnp.asarray(tokens)))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", MADE_IN_TORCH)
def test_an_adapter_made_in_torch_gives_its_logits_here(tmp_path, tokens, case):
    family, options = MADE_IN_TORCH[case]
    save_tiny(tmp_path / "base", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    with warnings.catch_warnings():
        # With lm_head as a target, PEFT says that it adds copies of the base's embeddings.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(tmp_path / "adapter")
    base = load_pretrained(tmp_path / "base")
    adapters = load_adapter(tmp_path / "adapter", base)
    ours, theirs = our_logits(base, adapters, tokens), torch_logits(model, tokens)
    close(ours, theirs)
    with model.disable_adapter():
        assert np.abs(theirs - torch_logits(model, tokens)).max() > 0.05
    assert adapter_info(tmp_path / "adapter") == (None, None, None)
    if case in ("biased_base", "untied_head"):
        scanned = load_pretrained(tmp_path / "base", scan_layers=True)
        stacked = load_adapter(tmp_path / "adapter", scanned)
        assert all(path.startswith(("layers/self_attn/", "lm_head/")) for path in stacked)
        close(our_logits(scanned, stacked, tokens), ours)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", dict(rank=4, alpha=9.5)),
        ("qwen2", dict(rank=3, alpha=4.0, rslora=True, where=".*(/q_proj|lm_head)/kernel")),
        ("smollm2", dict(rank=2, alpha=2.0, where="layers/.*/[qgd][a-z]*_proj/kernel")),
    ],
)
def test_our_adapter_gives_our_logits_in_torch(tmp_path, tokens, family, options, scan_layers):
    save_tiny(tmp_path / "base", family)
    base = load_pretrained(tmp_path / "base", scan_layers=scan_layers)
    adapters = random_adapters(base, **options)
    ours = our_logits(base, adapters, tokens)
    save_adapter(tmp_path / "out", adapters, base=base, limit="auto", dropout=0.1)
    again = load_adapter(tmp_path / "out", base)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    close(ours, torch_logits(model, tokens))
    close(ours, torch_logits(model.merge_and_unload(), tokens))


def test_ranks_and_alphas_that_differ_between_layers(tmp_path, tokens, llama_folder):
    base = load_pretrained(llama_folder)
    adapters = random_adapters(base, rank=4, alpha=8.0)
    adapters |= random_adapters(base, ".*/up_proj/kernel", rank=2, alpha=3.0)
    adapters |= random_adapters(base, "layers/1/.*/q_proj/kernel", rank=3, alpha=8.5)
    save_adapter(tmp_path / "out", adapters, base=base)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    q1 = "model.layers.1.self_attn.q_proj"
    assert config["r"] == 4 and config["rank_pattern"] == {"up_proj": 2, q1: 3}
    assert config["lora_alpha"] == 8 and config["alpha_pattern"] == {"up_proj": 3, q1: 8.5}
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    close(our_logits(base, adapters, tokens), torch_logits(model, tokens))


def test_the_folder_is_exactly_pefts(tmp_path, llama_folder):
    base = load_pretrained(llama_folder)
    some = random_adapters(base, "layers/(.*/q_proj|1/.*/k_proj)/kernel", corrected=True)
    save_adapter(tmp_path / "out", some, base=base, base_name="me/mine", limit=1.0)
    names = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.keys() <= peft.LoraConfig().to_dict().keys()
    assert config["target_modules"] == ["model.layers.1.self_attn.k_proj", "q_proj"]
    assert config["base_model_name_or_path"] == "me/mine"
    info = adapter_info(tmp_path / "out")
    assert info == (base_fingerprint(base), True, 1.0)
    assert all(a.corrected for a in load_adapter(tmp_path / "out", base).values())
    assert "me/mine" in (tmp_path / "out" / "README.md").read_text()
