"""Tiny random models of every supported family, made by torch `transformers`."""

from pathlib import Path

import torch
import transformers

SIZES = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
FAMILIES = {
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama_biased": ("Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "llama31": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "deepseek": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    ),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, num_attention_heads=2)),
    "mistral": ("Mistral", dict(sliding_window=None, tie_word_embeddings=False)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen2_tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
}


def torch_model(family: str, seed: int = 0, **changes):
    kind, options = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model


def save_tiny(folder: Path, family: str = "llama", dtype=torch.float32, shard=None, **changes):
    """A checkpoint folder and the torch model that is in it."""
    model = torch_model(family, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard or "1GB")
    return model


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.float().numpy()
