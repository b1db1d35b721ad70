"""A head that was trained whole, in an adapter's folder, goes to torch `peft` and comes from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from emloc_jax.adapters import Whole, attach, init_whole
from emloc_jax.checkpoints import (
    adapter_head,
    head_parameters,
    load_adapter,
    load_pretrained,
    save_adapter,
)
from emloc_jax.errors import AdapterMismatchError
from emloc_jax.kernels import intercept
from tests.checkpoints.random_adapters import random_adapters
from tests.models.torch_families import torch_model
from tests.models.torch_vision import VISION
from tests.models.torch_vision import torch_model as vision_model

TOKENS = np.random.default_rng(0).integers(5, 53, (2, 9), dtype=np.int32)
PIXELS = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
CLASSIFIER, POOLER = ["classifier"], ["bert.pooler.dense", "classifier"]
# peft 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def save_base(folder, variant):
    """A checkpoint without a classification head (or with one), and the class that has it."""
    torch.manual_seed(0)
    if variant == "vit":
        config = transformers.ViTConfig(**VISION, initializer_range=0.2)
        transformers.ViTModel(config).save_pretrained(folder)
        return transformers.ViTForImageClassification
    if variant == "siglip-both":
        vision_model(variant).save_pretrained(folder)
        return transformers.SiglipForImageClassification
    torch_model(variant).save_pretrained(folder)
    family = "Bert" if variant.startswith("bert") else "Roberta"
    return getattr(transformers, f"{family}ForSequenceClassification")


def trained(base):
    """Random adapters on the layers, and a head moved away from where it was."""
    rng = np.random.default_rng(1)
    whole = {
        path: Whole(one.value + rng.normal(0, 0.5, one.value.shape).astype(np.float32))
        for path, one in init_whole(base.params, where=head_parameters(base)).items()
    }
    return {**random_adapters(base, rank=3, alpha=5.0), **whole}


def our_logits(base, adapters):
    inputs = PIXELS if base.config.model_type in ("vit", "siglip") else TOKENS
    params = {"params": attach(base.params, adapters)}
    return np.asarray(jax.jit(intercept(base.model.apply))(params, inputs))


def torch_logits(model):
    if model.config.model_type in ("vit", "siglip"):
        inputs = {"pixel_values": torch.asarray(np.moveaxis(PIXELS, -1, 1).copy())}
    else:
        inputs = {"input_ids": torch.asarray(TOKENS).long()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def lora_config(modules, text):
    """What peft makes of the same training, by its own choice of what to save."""
    task = {"task_type": "SEQ_CLS"} if text else {"modules_to_save": modules}
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "q_proj"], **task)


@pytest.mark.parametrize(
    "variant, scan, modules",
    [
        ("bert", True, CLASSIFIER),
        ("bert-mlm", False, POOLER),  # it has no pooler, so that is made and trained, too
        ("roberta", False, CLASSIFIER),
        ("roberta-labels", True, CLASSIFIER),
        ("vit", False, CLASSIFIER),
        ("siglip-both", True, CLASSIFIER),
    ],
)
def test_peft_replaces_the_head_by_ours(tmp_path, variant, scan, modules):
    kind = save_base(tmp_path / "base", variant)
    labels = 3 if variant == "roberta-labels" else 4
    base = load_pretrained(tmp_path / "base", num_labels=labels, scan_layers=scan)
    adapters = trained(base)
    save_adapter(tmp_path / "out", adapters, base=base)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == modules
    assert f"num_labels={labels})" in (tmp_path / "out" / "README.md").read_text()

    model = kind.from_pretrained(tmp_path / "base", num_labels=labels)  # its head is random
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    np.testing.assert_allclose(our_logits(base, adapters), torch_logits(model), atol=1e-4)
    # Their own file of the same model has the same tensors, in the same types and numbers.
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

    assert adapter_head(tmp_path / "out") == (
        labels,
        tuple(f"LABEL_{i}" for i in range(labels)),
        None,
    )
    assert adapter_head(tmp_path / "theirs") == (labels, (), None)
    for name in ("out", "theirs"):
        again = load_adapter(tmp_path / name, base)
        assert jax.tree.structure(again) == jax.tree.structure(adapters)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))


@pytest.mark.parametrize("variant", ["roberta", "vit"])
def test_a_head_trained_in_torch_gives_their_logits(tmp_path, variant):
    kind = save_base(tmp_path / "base", variant)
    model = kind.from_pretrained(tmp_path / "base", num_labels=4)
    model = peft.get_peft_model(model, lora_config(CLASSIFIER, variant != "vit"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    base = load_pretrained(tmp_path / "base", num_labels=4)
    adapters = load_adapter(tmp_path / "adapter", base)
    head = {path for path, one in adapters.items() if isinstance(one, Whole)}
    assert head == set(head_parameters(base))
    np.testing.assert_allclose(our_logits(base, adapters), torch_logits(model), atol=1e-4)


def test_what_cannot_be_saved_or_read_is_said(tmp_path):
    save_base(tmp_path / "base", "bert")
    base = load_pretrained(tmp_path / "base", num_labels=3)
    adapters = trained(base)

    def refused(match, adapters=adapters):
        with pytest.raises(AdapterMismatchError, match=match):
            save_adapter(tmp_path / "no", adapters, base=base)

    refused("classifier/bias: missing", {p: a for p, a in adapters.items() if p[-4:] != "bias"})
    refused("pooler/kernel.*no part|pooler/bias: missing", {**adapters, **init_whole(
        base.params, where="pooler/kernel")})  # fmt: skip
    refused("embed_norm/bias: no part", {**adapters, "embed_norm/bias": Whole(jnp.ones(24))})
    refused(r"classifier/bias: \(4,\), the base has \(3,\)",
            {**adapters, "classifier/bias": Whole(jnp.ones(4))})  # fmt: skip
    assert not (tmp_path / "no").exists()

    save_adapter(tmp_path / "out", adapters, base=base)
    with pytest.raises(AdapterMismatchError, match=r"classifier.weight: \(3, 24\)"):
        load_adapter(tmp_path / "out", load_pretrained(tmp_path / "base", num_labels=5))
    with pytest.raises(AdapterMismatchError, match="no module can be taken whole.*num_labels"):
        load_adapter(tmp_path / "out", load_pretrained(tmp_path / "base"))
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    for entry in ("embeddings", "dense", "bert", "lm_head"):
        file.write_text(json.dumps(config | {"modules_to_save": ["classifier", entry]}))
        with pytest.raises(AdapterMismatchError, match=f"{entry} cannot"):
            load_adapter(tmp_path / "out", base)
    file.write_text(json.dumps(config | {"modules_to_save": None}))
    with pytest.raises(AdapterMismatchError, match="classifier.bias: not a LoRA factor"):
        load_adapter(tmp_path / "out", base)
    file.write_text(json.dumps(config))
    weights = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors["base_model.model.classifier.bias"]
    save_file(tensors, weights)
    with pytest.raises(AdapterMismatchError, match="classifier.bias: missing"):
        load_adapter(tmp_path / "out", base)
