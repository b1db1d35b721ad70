"""Folders of ViT, SigLIP and InternVL: torch's results, back without a loss, adapters in PEFT."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emloc_jax.adapters import attach
from emloc_jax.checkpoints import load_adapter, load_pretrained, save_adapter, save_pretrained
from emloc_jax.errors import AdapterMismatchError, CheckpointError
from emloc_jax.kernels import intercept
from emloc_jax.models import hf_tensor_names
from tests.checkpoints.random_adapters import random_adapters
from tests.models.torch_vision import (
    INTERNVLS,
    VARIANTS,
    channels_first,
    images,
    prompts,
    torch_logits,
    torch_model,
    torch_outputs,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def inputs_of(variant):
    """What our model takes."""
    if variant not in INTERNVLS:
        return (images(variant),)
    tokens, segments, _ = prompts(variant)
    shape = images(variant, 1).shape[1:]
    return tokens, None, segments, images(variant, 6).reshape(2, 3, *shape)


def ours(base, variant, adapters=None):
    params = base.params if adapters is None else attach(base.params, adapters)
    apply = jax.jit(intercept(base.model.apply))
    return np.asarray(apply({"params": params}, *inputs_of(variant)))


def theirs(variant):
    if variant not in INTERNVLS:
        outputs = torch_outputs(variant, *inputs_of(variant))
        return (outputs.logits if hasattr(outputs, "logits") else outputs[0]).numpy()
    tokens, _, segments, pixels = inputs_of(variant)
    return torch_logits(variant, tokens, segments, pixels, prompts(variant)[2])


def assert_close(found, expected, variant, atol=1e-4):
    real = prompts(variant)[1] > 0 if variant in INTERNVLS else slice(None)
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=atol)


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def in_torch(folder, name):
    kind = getattr(transformers, name)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_as_torch_reads_and_written_as_torch_wrote(tmp_path, variant):
    torch_model(variant).save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", scan_layers=variant != "siglip")
    assert base.fresh == () and bool(base.unused) == (variant == "siglip-both")
    assert_close(ours(base, variant), theirs(variant), variant)

    changed = jax.tree.map(lambda leaf: leaf + 1, base.params)
    save_pretrained(tmp_path / "out", changed, like=base)
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        moved = 0 if key in base.unused else 1
        assert torch.equal(before[key] + moved, after[key]), key
    in_torch(tmp_path / "out", VARIANTS[variant][0])


@pytest.mark.parametrize("variant", ["vit-labels", "siglip", "internvl", "internvl-6b"])
def test_files_with_the_names_of_the_class(tmp_path, variant):
    """Of other versions of transformers: no word of its own for what files hold."""
    model = torch_model(variant)
    model.save_pretrained(tmp_path / "base")
    names = dict(model.state_dict())
    if variant == "siglip":
        names = {f"vision_model.{name}": tensor for name, tensor in names.items()}
    save_file({k: t.clone() for k, t in names.items()}, tmp_path / "base/model.safetensors")
    base = load_pretrained(tmp_path / "base")
    assert_close(ours(base, variant), theirs(variant), variant)
    save_pretrained(tmp_path / "out", base.params, like=base)
    assert tensors_of(tmp_path / "out").keys() == names.keys()
    in_torch(tmp_path / "out", VARIANTS[variant][0])


def test_a_tied_head_that_differs(tmp_path):
    torch_model("internvl-6b").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["language_model.model.embed_tokens.weight"] + 1
    save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="language_model.lm_head.weight is to be a copy"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("variant", ["vit", "siglip", "siglip-both"])
def test_a_fresh_head_is_told_saved_and_read_by_torch(tmp_path, variant):
    torch_model(variant).save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", num_labels=7, scan_layers=True)
    assert set(base.fresh) == {"classifier/kernel", "classifier/bias"}
    save_pretrained(tmp_path / "out", base.params, like=base)
    model = in_torch(tmp_path / "out", base.config.class_name)
    assert base.config.class_name.endswith("ForImageClassification")
    with torch.no_grad():
        logits = model(pixel_values=channels_first(images(variant))).logits.numpy()
    np.testing.assert_allclose(ours(base, variant), logits, rtol=0, atol=1e-4)
    again = load_pretrained(tmp_path / "out")
    assert again.fresh == () and again.config == base.config


@pytest.mark.parametrize("variant", ["vit-labels", "siglip-labels", "internvl"])
def test_our_adapter_gives_our_logits_in_torch(tmp_path, variant):
    torch_model(variant).save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base", scan_layers=True)
    where = "((vision/)?layers|projector)/.*"
    adapters = random_adapters(base, where, rank=3, alpha=5.0)
    found = ours(base, variant, adapters)
    save_adapter(tmp_path / "out", adapters, base=base)
    model = getattr(transformers, VARIANTS[variant][0]).from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    with torch.no_grad():
        if variant == "internvl":
            assert any(path.startswith("vision/layers/mlp/") for path in adapters)
            tokens, _, segments, pixels = inputs_of(variant)
            counts = prompts(variant)[2]
            real = [own[:count] for own, count in zip(pixels, counts, strict=True)]
            expected = model(
                input_ids=torch.asarray(tokens).long(),
                attention_mask=torch.asarray(segments).long(),
                pixel_values=channels_first(np.concatenate(real)),
            )
        else:
            expected = model(pixel_values=channels_first(images(variant)))
    assert_close(found, expected.logits.numpy(), variant, atol=2e-4)
    assert np.abs(found - ours(base, variant)).max() > 0.01
    again = load_adapter(tmp_path / "out", base)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))

    # With the names of earlier versions of transformers, which files have still.
    file = tmp_path / "out" / "adapter_model.safetensors"
    old = {}
    for name, tensor in load_file(file).items():
        for tensors in hf_tensor_names(base.config).values():
            module = tensors.class_name.removesuffix(".weight")
            if f".{module}.lora_" in name:
                name = name.replace(module, tensors.name.removesuffix(".weight"))
                break
        old[name] = tensor
    save_file(old, file)
    again = load_adapter(tmp_path / "out", base)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))


def test_an_adapter_on_the_patches_is_no_linear_layer_of_peft(tmp_path):
    torch_model("vit").save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base")
    adapter = random_adapters(base)["layers/0/attention/query/kernel"]
    with pytest.raises(AdapterMismatchError, match="embed_patches/kernel: the base has no such"):
        save_adapter(tmp_path / "out", {"embed_patches/kernel": adapter}, base=base)
