"""Attention of long rows, some queries at a time, against a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.models.attend import attend

LENGTH = 600  # no multiple of what is taken at a time


def inputs(keys=LENGTH):
    draw = np.random.default_rng(0)
    shapes = ((2, LENGTH, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    return tuple(draw.normal(size=shape).astype(np.float32) for shape in shapes)


def reference(queries, keys, values, seen):
    queries, keys, values = (a.astype(np.float64) for a in (queries, keys, values))
    keys, values = (np.repeat(a, 2, axis=2) for a in (keys, values))
    scores = np.einsum("btnh,bsnh->bnts", queries, keys) / np.sqrt(8)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, values).reshape(2, LENGTH, 32)


def behind():
    place = np.arange(LENGTH)
    return place[:, None] - place[None, :]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"causal": True}, behind() >= 0),
        ({"causal": True, "window": 70}, (behind() >= 0) & (behind() < 70)),
        ({"causal": False}, np.ones((LENGTH, LENGTH), bool)),
    ],
)
def test_long_rows(options, seen):
    given = inputs()
    np.testing.assert_allclose(attend(*given, None, **options), reference(*given, seen), atol=2e-5)


def test_long_rows_with_a_mask():
    given = inputs(keys=40)
    mask = np.random.default_rng(1).random((2, 1, LENGTH, 40)) < 0.5
    mask[..., 0] = True
    found = attend(*given, jnp.asarray(mask), causal=True)
    np.testing.assert_allclose(found, reference(*given, mask), atol=2e-5)


def test_gradients_are_those_of_all_queries_at_once():
    given, weights = inputs(), np.random.default_rng(2).normal(size=(2, LENGTH, 32))

    def whole(queries, keys, values):
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        return jnp.vdot(mixed.reshape(weights.shape), weights)

    def parts(*given):
        return jnp.vdot(attend(*given, None, causal=True), weights)

    for ours, theirs in zip(
        jax.grad(parts, (0, 1, 2))(*given), jax.grad(whole, (0, 1, 2))(*given), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_memory_grows_with_the_length_not_its_square():
    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 8, 16), jnp.float32)
        run = jax.jit(jax.grad(lambda x: attend(x, x, x, None, causal=True).sum()))
        return run.lower(shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.6 * temporaries(2048)
