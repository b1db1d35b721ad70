"""Chunked cross-entropy: the textbook's value and gradient, at a chunk's memory and cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError
from emloc_jax.training import (
    chunked_cross_entropy,
    evaluate_loss,
    make_loss,
    packed_batches,
    padded_batches,
)
from tests.training.toy import Toy, toy_examples, toy_params


def data(batch=3, time=7, width=5, vocabulary=11, learnt=0.4):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(batch, time, width)).astype(np.float32)
    head = rng.normal(size=(width, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (batch, time)).astype(np.int32)
    weights = (rng.random((batch, time)) < learnt) * rng.random((batch, time))
    return hidden, head, targets, weights.astype(np.float32)


def reference(hidden, head, targets, weights):
    """Sum and gradients in float64, from the formulas."""
    h, k, w = (np.asarray(a, np.float64) for a in (hidden, head, weights))
    h, w, t = h.reshape(-1, h.shape[-1]), w.ravel(), targets.ravel()
    z = h @ k
    z = z - z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    rows = np.arange(len(t))
    total = -(w * np.log(p[rows, t])).sum()
    p[rows, t] -= 1
    gradient = p * w[:, None]
    return total, (gradient @ k.T).reshape(hidden.shape), h.T @ gradient


@pytest.mark.parametrize("chunk", [1, 4, 5, 21, 999])
def test_value_and_gradient_against_float64(chunk):
    hidden, head, targets, weights = data()

    def value(hidden, head):
        total, weight = chunked_cross_entropy(
            lambda h: h @ head, hidden, targets, weights, chunk=chunk
        )
        return total, weight

    gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    (total, weight), gradients = gradient(hidden, head)
    wanted, *wanted_gradients = reference(hidden, head, targets, weights)
    assert total.dtype == weight.dtype == jnp.float32
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    for gradient, right in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient, right, atol=3e-6)


def test_bf16_hidden_states_still_give_fp32_softmax():
    hidden, head, targets, weights = data()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    total, _ = chunked_cross_entropy(
        lambda h: h.astype(jnp.float32) @ head, hidden, targets, weights, chunk=4
    )
    wanted, *_ = reference(hidden.astype(jnp.float32), head, targets, weights)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, wanted, rtol=1e-6)


def test_unlearnt_tokens_cannot_spoil_the_sum():
    hidden, head, targets, weights = data(learnt=0.25)
    hidden[weights == 0] = np.nan
    clean = np.where(weights[..., None] == 0, 0, hidden)
    wanted, *_ = reference(clean, head, targets, weights)
    total, _ = chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, chunk=3)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    nothing, weight = chunked_cross_entropy(
        lambda h: h @ head, hidden, targets, weights * 0, chunk=3
    )
    assert (float(nothing), float(weight)) == (0.0, 0.0)


def test_all_logits_never_live_at_once():
    tokens, width, vocabulary, chunk = 2048, 16, 4096, 64
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    )

    def temporaries(chunk):
        def total(hidden, head, targets, weights):
            return chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, chunk=chunk)[
                0
            ]

        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = tokens * vocabulary * 4
    assert temporaries(tokens) > logits
    assert temporaries(chunk) < logits / 8


def test_packed_and_padded_rows_have_the_same_loss():
    examples, params = toy_examples(count=13), toy_params()
    loss = make_loss(Toy().apply, chunk=8)
    padded = evaluate_loss(loss, params, padded_batches(examples, batch_size=4, epochs=1))
    packed = evaluate_loss(
        loss, params, packed_batches(examples, batch_size=2, length=24, epochs=1)
    )
    assert padded.weight == packed.weight == sum(e.weights.sum() for e in examples)
    np.testing.assert_allclose(padded.loss, packed.loss, rtol=1e-6)
    # and each row alone, by the plain model; behind a row, padding cannot reach back
    apply = jax.jit(lambda tokens: Toy().apply({"params": params}, tokens)[0])
    total = 0.0
    for e in examples:
        size = len(e.tokens)
        z = np.asarray(apply(np.pad(e.tokens, (0, 14 - size))[None]), np.float64)[:size]
        losses = np.log(np.exp(z).sum(-1)) - z[np.arange(size), e.targets]
        total += (losses * e.weights).sum()
    np.testing.assert_allclose(padded.loss, total / padded.weight, rtol=1e-6)


def test_positions_and_segments_may_be_absent():
    (batch,) = padded_batches(toy_examples(1), batch_size=1, buckets=[14], epochs=1)
    loss, params = make_loss(Toy().apply), toy_params()
    bare = {key: batch[key] for key in ("tokens", "targets", "weights")}
    total = jax.jit(lambda batch: loss(params, batch)[0])
    np.testing.assert_allclose(total(bare), total(batch), rtol=1e-6)


def test_chunk_must_be_positive():
    hidden, head, targets, weights = data()
    with pytest.raises(ConfigError, match="chunk is 0"):
        chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, chunk=0)
