"""A one-layer linen language model with the methods `hidden` and `logits`, and rows for it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emloc_jax.training import Example

VOCABULARY = 23


class Toy(nn.Module):
    vocabulary: int = VOCABULARY
    width: int = 8

    def setup(self):
        self.embed = nn.Embed(self.vocabulary, self.width)
        self.place = nn.Embed(64, self.width)
        self.qkv = nn.Dense(3 * self.width, use_bias=False)
        self.out = nn.Dense(self.width)
        self.head = nn.Dense(self.vocabulary, use_bias=False)

    def hidden(self, tokens, positions=None, segments=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        x = self.embed(tokens) + self.place(positions)
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        mask = causal & (segments[:, :, None] == segments[:, None, :])
        scores = jnp.where(mask, q @ k.swapaxes(-1, -2) / self.width**0.5, -1e9)
        return x + jnp.tanh(self.out(jax.nn.softmax(scores) @ v))

    def logits(self, hidden):
        return self.head(hidden).astype(jnp.float32)

    def __call__(self, tokens, positions=None, segments=None):
        return self.logits(self.hidden(tokens, positions, segments))


def toy_params(seed=0):
    return jax.jit(Toy().init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


def toy_examples(count=11, longest=14, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(count):
        size = int(rng.integers(2, longest + 1))
        tokens = rng.integers(0, VOCABULARY, size + 1).astype(np.int32)
        weights = (np.arange(size) >= rng.integers(0, size)).astype(np.float32)
        examples.append(Example(tokens[:-1], tokens[1:], weights, f"row {row + 1}"))
    return examples
