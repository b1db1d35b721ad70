"""Who sees whom, read off the gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.models import Decoder
from tests.models.tiny import CONFIG, tokens, unrolled_params

LENGTH = 9
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)  # a window reaches further through layers


def influence(config, segments):
    """(T, T) bool: whether the output at one index moves with the embedding at another."""
    model, params = Decoder(config), unrolled_params(config)
    # One token per index, so that a row of the embedding is an index.
    inputs = jnp.arange(LENGTH, dtype=jnp.int32)[None]

    def outputs(embedding):
        own = {**params, "embed_tokens": {"embedding": embedding}}
        hidden = model.apply({"params": own}, inputs, None, segments, method="hidden")
        return hidden[0].sum(axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(params["embed_tokens"]["embedding"])
    return np.abs(jacobian[:, :LENGTH]).max(axis=-1) > 0


@pytest.mark.parametrize(
    "window, explicit",
    [(None, False), (None, True), (4, False), (4, True), (1, True), (100, False)],
)
def test_causal_within_the_window(window, explicit):
    config = dataclasses.replace(ONE_LAYER, sliding_window=window)
    segments = jnp.ones((1, LENGTH), jnp.int32) if explicit else None
    query, key = np.indices((LENGTH, LENGTH))
    expected = (key <= query) & (query - key < (window or LENGTH))
    np.testing.assert_array_equal(influence(config, segments), expected)


def test_segments_do_not_see_one_another_nor_padding():
    segments = np.array([[0, 1, 1, 1, 2, 2, 0, 3, 0]], np.int32)
    seen = influence(CONFIG, jnp.asarray(segments))
    query, key = np.indices((LENGTH, LENGTH))
    same = segments[0][query] == segments[0][key]
    np.testing.assert_array_equal(seen, (key <= query) & same)


def test_padded_tokens_change_nothing_and_give_finite_gradients():
    model, params, inputs = Decoder(CONFIG), unrolled_params(), tokens()
    segments = np.array([[1] * 6 + [0] * 4, [0] * 3 + [1] * 7], np.int32)

    @jax.jit
    def loss(params, inputs):
        logits = model.apply({"params": params}, inputs, None, segments)
        return jnp.sum(jnp.where(segments[..., None] > 0, logits, 0.0) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    other_padding = np.where(segments > 0, inputs, 36 - inputs)
    assert value == loss(params, other_padding)


def test_positions_are_relative():
    apply = jax.jit(Decoder(CONFIG).apply)
    variables, inputs = {"params": unrolled_params()}, tokens()
    shifted = jnp.arange(10)[None] + jnp.array([[0], [13]])
    np.testing.assert_allclose(
        apply(variables, inputs), apply(variables, inputs, shifted), atol=2e-5
    )
