"""A Llama-shaped model that is small enough to allocate, as a config.json describes it."""

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.memory import abstract_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def tiny(dtype="float32", **changes):
    return abstract_model({**CONFIG, **changes}, dtype=dtype, compute_dtype=dtype, name="tiny")


def real(tree):
    """Arrays of the shapes of a tree."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), tree)


def batch_of(setting):
    tokens = np.arange(setting.batch_size * setting.length).reshape(setting.batch_size, -1) % 96
    ones = np.ones_like(tokens)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": tokens.astype(np.int32),
        "positions": np.tile(np.arange(setting.length, dtype=np.int32), (setting.batch_size, 1)),
        "segments": ones.astype(np.int32),
        "weights": ones.astype(np.float32),
    }
