"""Tiny torch models of every supported architecture, and their weights in our tree."""

import functools

import numpy as np
import torch
import transformers

from emloc_jax.models import DecoderConfig
from tests.models.torch_tree import tree_of

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
# name -> (family, what differs from SIZES)
VARIANTS = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3": ("Llama", dict(rope_theta=5e5)),
    "llama3.1": ("Llama", dict(rope_theta=5e5, rope_scaling=LLAMA3_ROPE)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "smollm2": (
        "Llama",
        dict(rope_theta=1e5, tie_word_embeddings=True, num_attention_heads=2, head_dim=16,
             num_key_value_heads=1, rms_norm_eps=1e-5),
    ),
    "deepseek-coder": (
        "Llama", dict(rope_theta=1e5, rope_scaling=dict(type="linear", factor=4.0)),
    ),
    "mistral-window": ("Mistral", dict(sliding_window=5)),
    "mistral-full": ("Mistral", dict(sliding_window=None, head_dim=12)),
    "qwen2": ("Qwen2", dict(rope_theta=1e6)),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-biases": ("Qwen3", dict(head_dim=16, attention_bias=True)),
}  # fmt: skip


@functools.cache
def torch_model(variant):
    """A randomly initialised torch model with no parameter at its trivial value."""
    family, changes = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are born 1 and biases 0: both would hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    config.architectures = [type(model).__name__]
    return model


def hf_config(variant):
    return torch_model(variant).config.to_dict()


@functools.cache
def our_config(variant):
    return DecoderConfig.from_hf(hf_config(variant))


@functools.cache
def our_params(variant):
    return tree_of(torch_model(variant), our_config(variant))


def torch_logits(variant, tokens, attention_mask=None, position_ids=None):
    with torch.no_grad():
        return torch_model(variant)(
            torch.asarray(np.asarray(tokens)).long(),
            attention_mask=attention_mask,
            position_ids=position_ids,
        ).logits.numpy()
