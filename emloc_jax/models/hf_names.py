"""Which Hugging Face tensor each parameter is, and how it is stored there."""

from __future__ import annotations

import dataclasses
import re

from emloc_jax.models.config import DecoderConfig

__all__ = ["HfTensor", "hf_tensor_names", "is_buffer"]

# Checkpoints of early transformers carry the rotary table as a buffer; it is computed, not learned.
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint.

    Attributes:
        name: its key, ``'model.layers.0.self_attn.q_proj.weight'``.
        shape: its shape as stored there; a linear layer is ``(d_out, d_in)``.
        transpose: the parameter here is the transpose of it.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False


def hf_tensor_names(config: DecoderConfig) -> dict[str, HfTensor]:
    """Every parameter of the unrolled tree with its Hugging Face tensor, in model order.

    Args:
        config: the decoder's shape.

    Returns:
        Parameter path to ``HfTensor``. With tied embeddings there is no head on either side.

    Example:
        >>> from emloc_jax.models import DecoderConfig, hf_tensor_names
        >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> hf_tensor_names(config)["layers/0/self_attn/k_proj/kernel"]
        HfTensor(name='model.layers.0.self_attn.k_proj.weight', shape=(8, 16), transpose=True)
    """
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    linears = {  # (d_in, d_out, has a bias)
        "self_attn/q_proj": (c.hidden_size, queries, c.qkv_bias),
        "self_attn/k_proj": (c.hidden_size, keys, c.qkv_bias),
        "self_attn/v_proj": (c.hidden_size, keys, c.qkv_bias),
        "self_attn/o_proj": (queries, c.hidden_size, c.o_bias),
        "mlp/gate_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
        "mlp/up_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
        "mlp/down_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
    }
    norms = {"input_layernorm": c.hidden_size, "post_attention_layernorm": c.hidden_size}
    if c.qk_norm:
        norms |= {"self_attn/q_norm": c.head_dim, "self_attn/k_norm": c.head_dim}

    embedding = (c.vocab_size, c.hidden_size)
    names = {"embed_tokens/embedding": HfTensor("model.embed_tokens.weight", embedding)}
    for layer in range(c.num_layers):
        for path, (d_in, d_out, has_bias) in linears.items():
            name = f"model.layers.{layer}.{path.replace('/', '.')}"
            path = f"layers/{layer}/{path}"
            names[f"{path}/kernel"] = HfTensor(f"{name}.weight", (d_out, d_in), transpose=True)
            if has_bias:
                names[f"{path}/bias"] = HfTensor(f"{name}.bias", (d_out,))
        for path, width in norms.items():
            name = f"model.layers.{layer}.{path.replace('/', '.')}.weight"
            names[f"layers/{layer}/{path}/scale"] = HfTensor(name, (width,))
    names["norm/scale"] = HfTensor("model.norm.weight", (c.hidden_size,))
    if not c.tie_embeddings:
        names["lm_head/kernel"] = HfTensor("lm_head.weight", embedding, transpose=True)
    return names


def is_buffer(name: str) -> bool:
    """Whether a checkpoint key is a buffer of old transformers that no parameter stands for.

    Args:
        name: a key of a Hugging Face checkpoint.

    Returns:
        True for the rotary table of early Llama checkpoints.

    Example:
        >>> from emloc_jax.models import is_buffer
        >>> is_buffer("model.layers.3.self_attn.rotary_emb.inv_freq")
        True
    """
    return _BUFFER.fullmatch(name) is not None
