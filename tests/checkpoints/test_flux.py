"""Folders of diffusers' FLUX transformer, and adapters that its loaders read."""

import functools
import json
import re

import diffusers
import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_jax.adapters import merge
from emloc_jax.checkpoints import (
    adapter_info,
    load_adapter,
    load_pretrained,
    save_adapter,
    save_diffusers_adapter,
    save_pretrained,
)
from emloc_jax.errors import AdapterMismatchError, CheckpointError, UnsupportedArchitectureError
from emloc_jax.models import Flux, layer_depths, stack_layers
from tests.checkpoints.random_adapters import random_adapters
from tests.checkpoints.tiny import save_tiny
from tests.models.torch_flux import VARIANTS, random_inputs, torch_flux, torch_velocity

BLOCKS = "(double|single)_layers/.*"


@functools.cache
def program(config):
    """One compiled model for all tests: adapters are merged before they get here."""
    return jax.jit(Flux(config, scan_layers=True).apply)


def velocity(base, adapters=None):
    params = base.params if adapters is None else merge(base.params, adapters)
    if not base.model.scan_layers:
        params = stack_layers(params, layer_depths(base.config))
    return np.asarray(program(base.config)({"params": params}, **random_inputs(base.config)))


def in_torch(folder):
    kind = diffusers.FluxTransformer2DModel
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def folder(tmp_path):
    torch_flux("plain").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_read_as_diffusers_reads_and_written_as_it_wrote(tmp_path, variant, shard):
    torch_flux(variant).save_pretrained(tmp_path / "base", max_shard_size=shard)
    base = load_pretrained(tmp_path / "base", scan_layers=True)
    assert base.fresh == base.unused == () and base.tokenizer is None
    theirs = torch_velocity(torch_flux(variant), random_inputs(base.config))
    if shard == "1GB":
        np.testing.assert_allclose(velocity(base), theirs, rtol=0, atol=1e-4)
    save_pretrained(tmp_path / "out", base.params, like=base)
    names = {file.name for file in (tmp_path / "base").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert any(name.endswith("index.json") for name in names) == (shard == "60KB")
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = torch_velocity(in_torch(tmp_path / "out"), random_inputs(base.config))
    np.testing.assert_allclose(again, theirs, rtol=0, atol=1e-6)


def test_bf16_in_and_out(folder, tmp_path):
    base = load_pretrained(folder, dtype="bfloat16", scan_layers=True)
    abstract = load_pretrained(folder, dtype="bfloat16", scan_layers=True, abstract=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), base.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract.params
    )
    save_pretrained(tmp_path / "out", base.params, like=base, dtype="bfloat16")
    assert all(t.dtype == torch.bfloat16 for t in tensors_of(tmp_path / "out").values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"dtype", "torch_dtype"} & config.keys()
    in_torch(tmp_path / "out")


def test_folders_that_are_something_else(folder, tmp_path):
    other = tmp_path / "other"
    diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, layers_per_block=1
    ).save_pretrained(other)
    with pytest.raises(UnsupportedArchitectureError, match="AutoencoderKL.*FluxTransformer2DModel"):
        load_pretrained(other)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="whole diffusers pipeline.*transformer"):
        load_pretrained(tmp_path / "pipeline")
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["x_embedder.extra"] = torch.zeros(2)
    del tensors["single_transformer_blocks.1.proj_mlp.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    assert "missing: single_transformer_blocks.1.proj_mlp.bias (128,)" in str(caught.value)
    assert "unexpected: x_embedder.extra (2,)" in str(caught.value)
    file.unlink()
    with pytest.raises(CheckpointError, match="neither diffusion_pytorch_model.safetensors"):
        load_pretrained(folder)


# Where all layers of a name have an adapter, some of them, or the one whose name ends others'.
TARGETS = (BLOCKS, ".*", "(double_layers/(attn|ff).*|proj_out)/kernel")


@pytest.mark.parametrize("where", TARGETS)
def test_adapters_in_diffusers_and_peft(folder, tmp_path, where):
    base = load_pretrained(folder, scan_layers=True)
    adapters = random_adapters(base, where, rank=3, alpha=5.0)
    inputs = random_inputs(base.config)
    ours = velocity(base, adapters)

    save_diffusers_adapter(tmp_path / "lora", adapters, base=base, limit=1.0)
    model = in_torch(folder)
    model.load_lora_adapter(tmp_path / "lora", use_safetensors=True)
    np.testing.assert_allclose(ours, torch_velocity(model, inputs), rtol=0, atol=2e-4)

    save_adapter(tmp_path / "peft", adapters, base=base)
    model = peft.PeftModel.from_pretrained(in_torch(folder), tmp_path / "peft").eval()
    np.testing.assert_allclose(ours, torch_velocity(model, inputs), rtol=0, atol=2e-4)
    assert "from diffusers import Flux" in (tmp_path / "peft" / "README.md").read_text()

    for name in ("lora", "peft"):
        again = load_adapter(tmp_path / name, base)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))
        assert again.keys() == adapters.keys()
    assert adapter_info(tmp_path / "lora").limit == 1.0


def test_adapters_of_several_ranks(folder, tmp_path):
    base = load_pretrained(folder)
    adapters = random_adapters(base, ".*_layers/.*", rank=3, alpha=5.0)
    adapters |= random_adapters(base, "proj_out/kernel", rank=2, alpha=7.0)
    adapters |= random_adapters(base, ".*/to_out/kernel", rank=2, alpha=3.0)
    save_diffusers_adapter(tmp_path / "lora", adapters, base=base)
    model = in_torch(folder)
    model.load_lora_adapter(tmp_path / "lora", use_safetensors=True)
    theirs = torch_velocity(model, random_inputs(base.config))
    ours = velocity(base, adapters)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)
    again = load_adapter(tmp_path / "lora", base)
    assert {path: (a.rank, a.alpha) for path, a in again.items()} == {
        path: (a.rank, a.alpha) for path, a in adapters.items()
    }


@pytest.mark.filterwarnings("ignore")  # a pipeline without its other parts
def test_the_pipeline_s_own_loader_takes_it(folder, tmp_path):
    base = load_pretrained(folder, scan_layers=True)
    adapters = random_adapters(base, BLOCKS, rank=2, alpha=6.0)
    save_diffusers_adapter(tmp_path / "lora", adapters, base=base)
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=in_torch(folder),
        **dict.fromkeys(parts),
    )
    pipeline.load_lora_weights(tmp_path / "lora")
    theirs = torch_velocity(pipeline.transformer, random_inputs(base.config))
    np.testing.assert_allclose(velocity(base, adapters), theirs, rtol=0, atol=2e-4)


def test_adapters_that_diffusers_trained(folder, tmp_path):
    model = in_torch(folder)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "ff.net.2", "norm.linear"])
    model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs = torch_velocity(model, random_inputs(load_pretrained(folder).config))
    state = peft.get_peft_model_state_dict(model, adapter_name="default")
    meta = {"transformer": model.peft_config["default"].to_dict()}
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path / "new", state, transformer_lora_adapter_metadata=meta["transformer"]
    )
    # As files were before diffusers kept a config: alphas stand beside the factors.
    named = load_file(tmp_path / "new" / "pytorch_lora_weights.safetensors")
    for name in [name for name in named if "lora_A" in name]:
        named[name.replace("lora_A.weight", "alpha")] = torch.tensor(6.0)
    (tmp_path / "old").mkdir()
    save_file(named, tmp_path / "old" / "pytorch_lora_weights.safetensors", {"format": "pt"})
    base = load_pretrained(folder, scan_layers=True)
    for kind in ("new", "old"):
        adapters = load_adapter(tmp_path / kind, base)
        ours = velocity(base, adapters)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_a_language_model_is_no_base_for_diffusers(tmp_path):
    save_tiny(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", tokenizer=False)
    with pytest.raises(AdapterMismatchError, match=re.escape("save_adapter")):
        save_diffusers_adapter(tmp_path / "out", random_adapters(base), base=base)
