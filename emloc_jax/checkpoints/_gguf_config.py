"""A Hugging Face `config.json` made from the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from emloc_jax.checkpoints._gguf_rope import llama3_scaling
from emloc_jax.errors import CheckpointError, UnsupportedArchitectureError

__all__ = ["GGUF_FAMILIES", "hf_config_from_gguf"]

# general.architecture -> Hugging Face's name. llama.cpp writes Mistral and SmolLM2 as "llama".
GGUF_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def hf_config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    rope_factors: np.ndarray | None = None,
) -> dict[str, Any]:
    """The configuration that torch `transformers` would call the same model by.

    Args:
      metadata: key-value pairs of the file.
      tensors: its tensors by GGUF name; only the names are looked at (no `output.weight` means
        that the head is tied to the embedding).
      rope_factors: the tensor `rope_freqs.weight`, if there is one.

    Raises:
      UnsupportedArchitectureError: another family, experts, or a rope scaling not carried over.
      CheckpointError: a needed key is missing or impossible.
    """
    family = metadata.get("general.architecture")
    if family not in GGUF_FAMILIES:
        raise UnsupportedArchitectureError(
            f"GGUF architecture {family!r} is not supported; "
            f"supported are {', '.join(GGUF_FAMILIES)}."
        )

    def number(key: str, default: Any = ...) -> Any:
        value = metadata.get(f"{family}.{key}", default)
        if value is ...:
            raise CheckpointError(f"The GGUF file lacks the key '{family}.{key}'. Get another one.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 40:
            raise CheckpointError(
                f"The GGUF file says {value!r} for '{family}.{key}', which is impossible. Get it "
                "again."
            )
        return value

    if metadata.get(f"{family}.expert_count"):
        raise UnsupportedArchitectureError("GGUF models with experts are not supported.")
    width, heads = number("embedding_length"), number("attention.head_count")
    theta = _shortest(number("rope.freq_base", 10000.0))
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if rope_factors is not None:
        original = number("rope.scaling.original_context_length", 8192)
        scaling = llama3_scaling(rope_factors, theta, original)
    elif kind == "linear":
        scaling = {"rope_type": kind, "factor": _shortest(number("rope.scaling.factor"))}
    elif kind == "none":
        scaling = None
    else:
        raise UnsupportedArchitectureError(f"GGUF rope scaling {kind!r} is not supported.")
    config = {
        "architectures": [GGUF_FAMILIES[family]],
        "model_type": family,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())) or number("vocab_size"),
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", width // heads),
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    }
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = token
    return config


def _shortest(value: float) -> float:
    """The shortest decimal with this float32 value: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
