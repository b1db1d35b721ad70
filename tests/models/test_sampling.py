"""The distribution that tokens are drawn from, against its definition in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.models import sample_tokens

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15]))


def expected_distribution(temperature, top_k, top_p):
    p = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    order = np.argsort(-p)
    keep = order[: top_k or None]
    p = np.where(np.isin(np.arange(5), keep), p, 0.0)
    p /= p.sum()
    if top_p is not None:
        smallest = next(n for n in range(1, 6) if p[order[:n]].sum() >= top_p - 1e-12)
        p = np.where(np.isin(np.arange(5), order[:smallest]), p, 0.0)
    return p / p.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, None),
        (0.5, None, None),
        (2.0, 3, None),
        (1.0, 99, None),
        (1.0, None, 0.75),
        (1.0, None, 0.3),  # less than the likeliest token's own probability
        (1.0, None, 1.0),
        (1.0, 3, 0.8),
    ],
)
def test_frequencies(temperature, top_k, top_p):
    draws = 20_000
    keys = jax.random.split(jax.random.key(3), draws)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, 5))
    sample = jax.jit(sample_tokens, static_argnames="top_k")
    drawn = sample(keys, logits, temperature=temperature, top_k=top_k, top_p=top_p)
    frequencies = np.bincount(drawn, minlength=5) / draws
    expected = expected_distribution(temperature, top_k, top_p)
    np.testing.assert_allclose(frequencies, expected, atol=0.015)
    assert not frequencies[expected == 0].any()


def test_a_row_depends_on_its_own_key_and_logits_only():
    keys = jax.random.split(jax.random.key(0), 6)
    logits = jax.random.normal(jax.random.key(1), (6, 11))
    sample = jax.jit(functools.partial(sample_tokens, temperature=1.0, top_k=7, top_p=0.9))
    together = sample(keys, logits)
    for row in (0, 5):
        alone = sample(keys[row : row + 1], logits[row : row + 1])
        assert alone[0] == together[row]
