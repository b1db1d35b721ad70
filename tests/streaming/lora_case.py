"""A tiny model with adapters, rows for it, and the two ways to train it."""

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import attach, init_adapters
from emloc_jax.kernels import find_kernels, intercept
from emloc_jax.models import Decoder, DecoderConfig, Gpt2, Gpt2Config, MemoryBlocks, block_stack
from emloc_jax.streaming import StreamedLoraStep
from emloc_jax.training import (
    init_state,
    make_head_loss,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
)

VOCABULARY, LENGTH, ROWS = 48, 10, 4


def decoder(layers=3, **options):
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
    )
    return Decoder(config, remat=True, **options)


def gpt2(layers=3, **options):
    config = Gpt2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=layers,
        num_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return Gpt2(config, remat=True, **options)


def batches(seed=0):
    rng = np.random.default_rng(seed)
    while True:
        tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": (rng.random((ROWS, LENGTH)) < 0.6).astype(np.float32),
            "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
            "segments": np.ones((ROWS, LENGTH), np.int32),
        }


class Case:
    """One model, its adapters, and both steps."""

    def __init__(self, model, *, dropout=0.0, where="layers/.*", inputs_in="device", **options):
        tokens = jnp.zeros((1, LENGTH), jnp.int32)
        self.model, self.stack = model, block_stack(model, wrap=intercept)
        self.params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        apply = intercept(model.apply)
        found = find_kernels(model.apply, self.params, tokens)
        kernels = {path: spec for path, spec in found.items() if not spec.tied}
        self.adapters = init_adapters(jax.random.key(1), kernels, where=where, rank=2, alpha=4)
        schedule = make_schedule(1e-2, steps=10, warmup=2)
        self.tx = make_optimizer(schedule, weight_decay=0.1)
        options = {"clip": 0.05, "schedule": schedule} | options
        self.loss, self.head_loss = make_loss(apply, chunk=8), make_head_loss(apply, chunk=8)

        def combine(adapters, frozen, key):
            return attach(frozen, adapters, dropout=dropout, key=key)

        self.in_memory = make_train_step(self.loss, self.tx, combine=combine, **options)
        self.streamed = StreamedLoraStep(
            self.stack, self.head_loss, self.tx, dropout=dropout, inputs_in=inputs_in, **options
        )
        self.source = MemoryBlocks(self.stack, jax.device_get(self.params))

    def state(self):
        return init_state(self.adapters, self.tx, seed=3)


def require_same_bits(one, other):
    leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*leaves, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
