"""The Llama family's parameters in Hugging Face checkpoints."""

from __future__ import annotations

from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.hf_storage import HfStorage, HfTensor

__all__ = ["decoder_storage"]


def decoder_storage(config: DecoderConfig) -> HfStorage:
    """Tensors of a decoder; a tied head has none, but may be there as a copy.

    Args:
        config: the decoder's shape.

    Returns:
        Its storage.
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
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if c.tie_embeddings else {}
    return HfStorage(names, copies)
