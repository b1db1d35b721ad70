"""One table says which model runs which config.json; nothing else knows them by name."""

import pytest

from emloc_jax.errors import UnsupportedArchitectureError
from emloc_jax.models import (
    Decoder,
    Encoder,
    Flux,
    FluxConfig,
    Gpt2,
    InternVL,
    VisionEncoder,
    config_from_hf,
    hf_storage,
    is_buffer,
    model_from_config,
    model_from_hf,
    supported_architectures,
    supported_classes,
)

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, n_embd=16, n_layer=2, n_head=4)
SIZES |= dict(image_size=16, patch_size=4)
NESTED = {"vision_config": SIZES, "text_config": SIZES, "image_token_id": 3, "image_seq_length": 4}
KINDS = {"GPT2": Gpt2, "Bert": Encoder, "Robe": Encoder, "ViTM": VisionEncoder}
KINDS |= {"ViTF": VisionEncoder, "Sigl": VisionEncoder}
KINDS |= {"InternVLVisionModel": VisionEncoder, "InternVLForConditionalGeneration": InternVL}


OF_TRANSFORMERS = [name for name in supported_classes() if not name.startswith("Flux")]


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_every_class_has_its_model_by_type_and_by_class(name):
    hf = {"architectures": [name], **SIZES, **NESTED}
    config = config_from_hf(hf)
    kind = type(model_from_hf(hf))
    assert config == config_from_hf(hf | {"model_type": config.model_type})
    assert config.to_hf()["architectures"] == [name]
    assert kind is KINDS.get(name, KINDS.get(name[:4], Decoder))
    assert model_from_config(config, scan_layers=True).scan_layers
    tensors = hf_storage(config).tensors
    assert len({tensor.name for tensor in tensors.values()}) == len(tensors)
    assert not any(is_buffer(tensor.name) for tensor in tensors.values())


def test_a_class_of_diffusers_is_told_by_its_own_key():
    config = config_from_hf(FluxConfig().to_hf() | {"model_type": "bert"})
    assert config == FluxConfig()
    assert isinstance(model_from_config(config, scan_layers=True), Flux)


def test_type_alone_gives_the_plainest_class():
    for model_type, name in supported_architectures().items():
        assert config_from_hf({"model_type": model_type, **SIZES}).to_hf()["architectures"] == [
            name
        ]
    assert config_from_hf({"model_type": "bert", **SIZES}).head is None


@pytest.mark.parametrize(
    "hf",
    [
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"},
        {"architectures": ["DistilBertModel"]},
        {},
    ],
)
def test_others_are_refused_with_a_list(hf):
    with pytest.raises(UnsupportedArchitectureError) as caught:
        model_from_hf(hf | SIZES)
    assert all(name in str(caught.value) for name in supported_classes())


def test_a_class_of_another_type_and_a_config_of_another_kind():
    for model_type, name in (("gpt2", "LlamaForCausalLM"), ("roberta", "BertForMaskedLM")):
        with pytest.raises(UnsupportedArchitectureError, match=name):
            model_from_hf({"architectures": [name], "model_type": model_type, **SIZES})
    with pytest.raises(UnsupportedArchitectureError, match="dict"):
        hf_storage({})


@pytest.mark.parametrize(
    "name",
    [
        "h.11.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "embeddings.position_ids",
        "bert.embeddings.position_ids",
        "roberta.embeddings.token_type_ids",
    ],
)
def test_buffers_of_old_checkpoints(name):
    assert is_buffer(name)
