"""Tiny GGUF files, written with the `gguf` package from tiny torch models."""

import gguf
import numpy as np

from tests.checkpoints.tiny import torch_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = ["<pad>", "<s>", "</s>", "Ġ", "a", "b", "ab", "1", "Ġab"]
MERGES = ["a b", "Ġ ab"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def permute(array, heads):
    """llama.cpp's converter: first and second half of each head interleaved."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(array.shape)


def llama3_table(config, factor=None):
    """What the frequencies of torch's own rope are divided by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    half = scaled.shape[0]
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(half) / half)
    return (plain / scaled.numpy() if factor is None else factor * np.ones(half)).astype("f4")


def write_gguf(path, family="llama", quantise=False, table_factor=None, **metadata):
    """A GGUF file and the torch model it was made from."""
    model = torch_model(family, hidden_size=32, intermediate_size=64)
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or 32 // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_rope_scaling_orig_ctx_len(
            config.rope_parameters["original_max_position_embeddings"]
        )
        writer.add_tensor("rope_freqs.weight", llama3_table(config, table_factor))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS + [f"<{i}>" for i in range(len(TOKENS), config.vocab_size)])
    writer.add_token_types([3, 3, 3] + [1] * 6 + [4] * (config.vocab_size - len(TOKENS)))
    writer.add_token_merges(MERGES)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if arch == "llama" and ".q_proj." in name:
            array = permute(array, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            array = permute(array, config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantise and array.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
