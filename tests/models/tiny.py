"""One tiny decoder, made without torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qk_norm=True,
    qkv_bias=True,
    max_position_embeddings=48,
    initializer_range=0.3,
    model_type="qwen3",
)


@functools.cache
def unrolled_params(config=CONFIG):
    """Parameters of the unrolled layout, biases and norms away from 0 and 1."""
    init = jax.jit(Decoder(config).init)
    params = init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves, structure = jax.tree.flatten(params)
    noisy = [
        leaf + 0.1 * np.random.default_rng(index).normal(size=leaf.shape).astype(np.float32)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, noisy)


def tokens(rows=2, length=10, seed=0):
    return np.random.default_rng(seed).integers(0, 37, (rows, length), dtype=np.int32)
