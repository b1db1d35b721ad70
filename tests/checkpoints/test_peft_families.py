"""Adapters on GPT-2's Conv1D and on encoders go to torch `peft` and come from it."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from emloc_jax.adapters import attach
from emloc_jax.checkpoints import load_adapter, load_pretrained, save_adapter
from emloc_jax.errors import AdapterMismatchError
from emloc_jax.kernels import intercept
from tests.checkpoints.random_adapters import random_adapters
from tests.checkpoints.tiny import save_tiny
from tests.models.torch_families import VARIANTS, torch_model

TOKENS = np.random.default_rng(0).integers(5, 53, (2, 9), dtype=np.int32)
# peft 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def our_logits(base, adapters):
    params = {"params": attach(base.params, adapters)}
    return np.asarray(jax.jit(intercept(base.model.apply))(params, TOKENS))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.asarray(TOKENS).long()).logits.numpy()


@pytest.mark.parametrize(
    "variant, scan",
    [("gpt2", False), ("gpt2", True), ("bert-labels", True), ("roberta-mlm", False)],
)
def test_our_adapter_gives_our_logits_in_torch(tmp_path, variant, scan):
    torch_model(variant).save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", scan_layers=scan)
    adapters = random_adapters(base, rank=3, alpha=5.0)
    ours = our_logits(base, adapters)
    save_adapter(tmp_path / "out", adapters, base=base)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (variant == "gpt2")
    assert config["task_type"] == ("CAUSAL_LM" if variant == "gpt2" else None)
    kind = getattr(transformers, VARIANTS[variant][0])
    model = peft.PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base"), tmp_path / "out"
    ).eval()
    np.testing.assert_allclose(ours, torch_logits(model), rtol=0, atol=2e-4)
    again = load_adapter(tmp_path / "out", base)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))


def test_an_adapter_made_in_torch_for_conv1d(tmp_path):
    torch_model("gpt2").save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    options = dict(r=2, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    base = load_pretrained(tmp_path / "base")
    adapters = load_adapter(tmp_path / "adapter", base)
    assert set(adapters) == {
        f"layers/{i}/{name}/kernel" for i in range(2) for name in ("attn/c_attn", "mlp/c_fc")
    }
    np.testing.assert_allclose(our_logits(base, adapters), torch_logits(model), rtol=0, atol=2e-4)


def test_copies_of_a_base_that_names_its_tensors_without_a_prefix(tmp_path):
    """PEFT stores embeddings on request, by the names of its class."""
    torch_model("gpt2-untied").save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(model, options).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.transformer.wte.weight" in stored
    weights = tmp_path / "base" / "model.safetensors"
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    base = load_pretrained(tmp_path / "base")
    assert len(load_adapter(tmp_path / "adapter", base)) == 2
    tensors["wte.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(AdapterMismatchError, match="not a LoRA factor"):
        load_adapter(tmp_path / "adapter", load_pretrained(tmp_path / "base"))


def test_the_option_of_conv1d_is_refused_elsewhere(tmp_path):
    save_tiny(tmp_path / "base")
    base = load_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "out", random_adapters(base), base=base)
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))
    with pytest.raises(AdapterMismatchError, match="fan_in_fan_out=True"):
        load_adapter(tmp_path / "out", base)
