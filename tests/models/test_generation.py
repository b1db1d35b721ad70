"""Cached decoding against the full forward pass, and generation's promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.models import Decoder, generate, grow_cache, init_cache, stack_layers
from emloc_jax.models.generation import _generate_batch
from tests.models.test_layouts import boxed
from tests.models.tiny import CONFIG, tokens, unrolled_params

PROMPTS = [[5, 3, 9, 30, 2], [7], [11, 36, 4], [1, 2, 3, 4, 5, 6, 7]]
LAYOUTS = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])


@functools.cache  # one model object, so that compiled programs are shared between tests
def setup(scan=False, config=CONFIG):
    params = unrolled_params(config)
    model = Decoder(config, scan_layers=scan)
    return model, stack_layers(params, config.num_layers) if scan else params


@pytest.mark.parametrize("scan, window", [(False, None), (True, 4)])
def test_cached_decoding_equals_the_full_forward(scan, window):
    """A prompt of 6 in one call, then token by token, then three at once; one row is padded."""
    config = dataclasses.replace(CONFIG, sliding_window=window)
    model, params = setup(scan, config)
    inputs, padding = tokens(2, 12), np.array([[0], [2]])
    positions = np.arange(12)[None] - padding
    segments = (positions >= 0).astype(np.int32)
    full = jax.jit(model.apply)({"params": params}, inputs, positions, segments)

    decode = jax.jit(lambda *args: model.apply({"params": params}, *args, method="decode"))
    cache, pieces = init_cache(config, 2, 6), []
    for first, last in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 12)):
        own = np.where(positions < 0, -1, positions)[:, first:last]
        logits, cache = decode(inputs[:, first:last], own, cache)
        pieces.append(logits)
        if last == 6:
            cache = grow_cache(cache, 12)
    cached = np.concatenate(pieces, axis=1)
    real = segments.astype(bool)
    np.testing.assert_allclose(cached[real], full[real], atol=2e-5)
    assert cache["length"] == 12 and np.isfinite(cached).all()


def test_last_only_is_the_last_row_of_all():
    model, params = setup()
    arguments = {"params": params}, tokens(2, 5), np.arange(5)[None].repeat(2, 0)
    cache = init_cache(CONFIG, 2, 5)
    apply = jax.jit(model.apply, static_argnames=("last_only", "method"))
    every, _ = apply(*arguments, cache, method="decode")
    last, _ = apply(*arguments, cache, last_only=True, method="decode")
    assert last.shape == (2, 1, 37)
    np.testing.assert_allclose(last[:, 0], every[:, -1], atol=1e-5)


def test_prefill_never_forms_all_logits():
    config = dataclasses.replace(CONFIG, vocab_size=5000, max_position_embeddings=128)
    model, batch, length = Decoder(config), 4, 64
    params = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 1))["params"]
    integers = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    compiled = _generate_batch.lower(
        params, integers, integers, np.zeros(0, np.int32), {}, {}, apply=model.apply, config=config,
        dtype=jnp.dtype(jnp.float32), max_new_tokens=2, top_k=None,
    ).compile()  # fmt: skip
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * 5000 * 4 / 2


def naive(model, params, prompt, steps):
    """Greedy continuation by whole forward passes; what stands behind the last token is ignored."""
    row = np.zeros((1, 16), np.int32)
    row[0, : len(prompt)] = prompt
    apply = jax.jit(model.apply)
    for index in range(len(prompt), len(prompt) + steps):
        row[0, index] = jnp.argmax(apply({"params": params}, row)[0, index - 1])
    return row[0, len(prompt) : index + 1].tolist()


@LAYOUTS
def test_greedy_equals_naive_decoding(scan):
    model, params = setup(scan)
    replies = generate(model, params, PROMPTS, max_new_tokens=6, pad_to=8)
    assert replies == [naive(model, params, prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(temperature=0.8, top_k=9, top_p=0.9, key=jax.random.key(5))],
    ids=["greedy", "sampled"],
)
def test_a_row_does_not_depend_on_batch_or_padding(settings):
    model, params = setup(scan=True)

    def run(prompts=PROMPTS, **shape):
        return generate(model, params, prompts, max_new_tokens=6, **settings, **shape)

    together = run(pad_to=8)
    five = run([*PROMPTS, [8]], pad_to=8, batch_size=4)  # the second call has three empty rows
    assert five[:4] == together and len(five) == 5
    assert run(PROMPTS[:1], pad_to=5) == together[:1]


def test_stop_tokens_end_a_row_and_are_not_returned():
    model, params = setup(scan=True)
    free = generate(model, params, PROMPTS, max_new_tokens=6, pad_to=8)
    stops = {free[0][2], free[3][0]}
    stopped = generate(model, params, PROMPTS, max_new_tokens=6, eos_ids=tuple(stops), pad_to=8)
    for reply, whole in zip(stopped, free, strict=True):
        ends = [index for index, token in enumerate(whole) if token in stops]
        assert reply == whole[: ends[0] if ends else None]
    assert stopped[3] == []


def test_the_loop_ends_when_every_row_has_ended():
    model, params = setup(scan=True)
    first = generate(model, params, PROMPTS, max_new_tokens=6, pad_to=8)
    calls = []

    def apply(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return model.apply(*args, **kwargs)

    stops = tuple(reply[0] for reply in first)
    replies = generate(
        model, params, PROMPTS, max_new_tokens=30, eos_ids=stops, pad_to=8, apply=apply
    )
    jax.effects_barrier()
    assert replies == [[], [], [], []] and len(calls) == 1  # the prefill alone


@LAYOUTS
def test_boxed_kernels_generate_as_their_products(scan):
    model, _ = setup(scan)
    params = boxed(unrolled_params())
    plain = jax.tree.map(
        lambda leaf: leaf.unbox() if hasattr(leaf, "unbox") else leaf,
        params,
        is_leaf=lambda leaf: hasattr(leaf, "unbox"),
    )
    trees = [stack_layers(tree, 2) if scan else tree for tree in (params, plain)]
    ours, expected = (generate(model, tree, PROMPTS, max_new_tokens=6, pad_to=8) for tree in trees)
    assert ours == expected


def test_one_compilation_per_shape():
    model, params = setup(scan=True)
    before = _generate_batch._cache_size()
    settings = dict(max_new_tokens=3, pad_to=8, batch_size=2, key=jax.random.key(0))
    for seed in range(3):
        prompts = tokens(2, 3 + seed, seed).tolist()
        generate(model, params, prompts, temperature=0.5 + seed, top_p=0.5 + 0.1 * seed, **settings)
    generate(model, params, [[1]] * 5, temperature=1.0, top_p=0.9, **settings)
    assert _generate_batch._cache_size() == before + 1


def test_bf16_cache():
    model, params = setup(scan=True)
    model = model.clone(dtype=jnp.bfloat16)
    replies = generate(model, params, PROMPTS, max_new_tokens=4, pad_to=8)
    assert [len(reply) for reply in replies] == [4] * 4


def test_no_prompts_no_work():
    assert generate(Decoder(CONFIG), {}, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    "prompts, words",
    [
        ([[1], []], "Prompt 1 has no tokens"),
        ([[1, 37]], "0 to 36"),
        ([[-1]], "from -1"),
        ([[1], [2] * 46], "Prompt 1 has 46 tokens and 3 new ones .* context holds 48"),
    ],
)
def test_bad_prompts_are_refused(prompts, words):
    with pytest.raises(DataError, match=words):
        generate(Decoder(CONFIG), {}, prompts, max_new_tokens=3)


def test_the_context_may_be_filled_to_the_last_token():
    model, params = setup(scan=True)
    assert len(generate(model, params, [[2] * 46], max_new_tokens=2, pad_to=46)[0]) == 2


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=1.0),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(batch_size=0),
        dict(pad_to=0),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        generate(Decoder(CONFIG), {}, [[1]], **{"max_new_tokens": 3, **settings})
