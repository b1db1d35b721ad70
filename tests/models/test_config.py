"""config.json in both forms, back again, and everything that is refused by name."""

import dataclasses

import pytest

from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.models import DecoderConfig, RopeScaling, model_from_hf, supported_architectures

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def read(model_type="llama", **changes):
    architecture = supported_architectures()[model_type]
    hf = {"architectures": [architecture], "model_type": model_type, **SIZES, **changes}
    return DecoderConfig.from_hf({key: value for key, value in hf.items() if value != "absent"})


@pytest.mark.parametrize(
    "keys, theta, scaling",
    [
        ({}, 1e4, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        (
            {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4}},
            1e5,
            RopeScaling("linear", 4.0),
        ),
        (
            {"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0}},
            1e5,
            RopeScaling("linear", 4.0),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3", "original_max_position_embeddings": 16, **LLAMA3
                },
            },
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        ),
        (
            {"max_position_embeddings": 99, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
            1e4,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 99),
        ),
    ],
)  # fmt: skip
def test_both_forms_of_rope(keys, theta, scaling):
    config = read(**keys)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    assert DecoderConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", dict(attention_bias=True, mlp_bias=True, eos_token_id=[3, 5], bos_token_id=1)),
        ("llama", dict(head_dim=12, tie_word_embeddings=True, eos_token_id=2)),
        ("mistral", dict(sliding_window=7, num_key_value_heads=2)),
        ("mistral", dict(sliding_window=None, num_key_value_heads=2)),
        ("qwen2", dict(num_key_value_heads=2)),
        ("qwen3", dict(num_key_value_heads=2, attention_bias=True)),
    ],
)
def test_there_and_back(model_type, changes):
    config = read(model_type, **changes)
    assert DecoderConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_absent_keys_have_the_defaults_of_their_family():
    assert read().num_kv_heads == 4 and read().head_dim == 8
    mistral = read("mistral", num_attention_heads=8)
    assert (mistral.num_kv_heads, mistral.sliding_window) == (8, 4096)
    qwen3 = read("qwen3", num_attention_heads=32)
    assert (qwen3.num_kv_heads, qwen3.head_dim, qwen3.qk_norm) == (32, 128, True)
    qwen2 = read("qwen2", num_key_value_heads=4)
    assert qwen2.qkv_bias and not qwen2.o_bias and qwen2.sliding_window is None


def test_model_type_alone_or_class_alone_is_enough():
    without_class = {"model_type": "llama", **SIZES}
    without_type = {"architectures": ["LlamaForCausalLM"], **SIZES}
    assert DecoderConfig.from_hf(without_class) == DecoderConfig.from_hf(without_type) == read()
    assert model_from_hf(without_class, scan_layers=True).config == read()


def test_a_window_that_no_layer_uses_is_no_window():
    """Qwen2's published configs name a window that is switched off."""
    off = dict(num_key_value_heads=2, sliding_window=131072, max_window_layers=28)
    assert read("qwen2", use_sliding_window=False, **off).sliding_window is None
    assert read("qwen2", use_sliding_window=True, **off).sliding_window is None  # 2 layers < 28
    kinds = ["full_attention"] * 2
    on = dict(use_sliding_window=True, max_window_layers=0, layer_types=kinds)
    assert read("qwen2", num_key_value_heads=2, **on).sliding_window is None


@pytest.mark.parametrize(
    "hf, words",
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "mixtral"),
        ({"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}, "smollm3"),
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "Sequence"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mixtral"}, "mixtral"),
        ({}, "None"),
    ],
)
def test_other_architectures_are_refused_by_name(hf, words):
    with pytest.raises(UnsupportedArchitectureError, match=words) as error:
        DecoderConfig.from_hf({**SIZES, **hf})
    for name in supported_architectures().values():
        assert name in str(error.value)


@pytest.mark.parametrize(
    "model_type, changes, words",
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "'yarn'"),
        ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)), "'dynamic'"),
        ("llama", dict(rope_parameters=dict(rope_type="longrope")), "'longrope'"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("llama", dict(quantization_config=dict(quant_method="gptq")), "gptq"),
        ("qwen2", dict(use_sliding_window=True, max_window_layers=1), "use_sliding_window=True"),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        ("mistral", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ],
)
def test_unimplemented_options_are_refused_by_name(model_type, changes, words):
    with pytest.raises(UnsupportedArchitectureError, match=words):
        read(model_type, num_key_value_heads=2, **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hidden_size="absent"), "'hidden_size'"),
        (dict(num_hidden_layers=0), "'num_hidden_layers'"),
        (dict(vocab_size=6.5), "'vocab_size'"),
        (dict(num_key_value_heads=3), "num_kv_heads=3"),
        (dict(head_dim=7), "head_dim=7"),
        (dict(rope_scaling=dict(type="linear")), "'factor'"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "'low_freq_factor'"),
        (
            dict(rope_scaling=dict(
                rope_type="llama3", factor=2.0, low_freq_factor=4.0, high_freq_factor=1.0)),
            "smaller",
        ),
        (dict(rope_theta=0), "'rope_theta'"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        read(**changes)


def test_to_hf_refuses_what_the_family_cannot_say():
    config = dataclasses.replace(read(), qk_norm=True)
    with pytest.raises(UnsupportedArchitectureError, match="qk_norm=True"):
        config.to_hf()


def test_dropout_in_attention_is_named_in_the_log(caplog):
    read(attention_dropout=0.1)
    assert "attention_dropout=0.1" in caplog.text
