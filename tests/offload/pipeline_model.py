"""A tiny language model and its loss, for tests of the pipelined trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emloc_jax.kernels import intercept
from emloc_jax.models import Decoder, DecoderConfig, block_stack

VOCABULARY = 29


def tiny_model(*, layers=2, dtype=jnp.float32, tied=True):
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        tie_embeddings=tied,
    )
    model = Decoder(config, param_dtype=dtype)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # Larger than usual, so that no gradient is lost in rounding.
    params = jax.tree.map(lambda leaf: (4 * leaf if leaf.ndim > 1 else leaf).astype(dtype), params)
    return model, params


def make_stack(model):
    return block_stack(model, wrap=intercept)


def batch_of(seed, rows=4, length=6):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (rows, length + 1)).astype(np.int32)
    weights = generator.integers(0, 2, (rows, length)).astype(np.float32)
    weights[:, 0] = 1
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def head_loss(model):
    def loss(outer, x, batch):
        logits = model.apply({"params": outer}, x, method="head")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])

    return loss


def mean_loss(model):
    """The same loss of the whole model, for references that know nothing of blocks."""

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

    return loss
