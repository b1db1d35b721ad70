"""Batched generation with a key/value cache: one compiled program per batch shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from emloc_jax.errors import ConfigError
from emloc_jax.models.cache import grow_cache, init_cache
from emloc_jax.models.causal import CausalModel
from emloc_jax.models.image_tokens import check_images
from emloc_jax.models.prompts import check_prompts, pad_prompts
from emloc_jax.models.sampling import sample_tokens

__all__ = ["check_settings", "choose_token", "generate", "row_keys"]


def generate(
    model: CausalModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    batch_size: int | None = None,
    pad_to: int = 64,
    apply: Callable | None = None,
    pixels: Sequence[np.ndarray] | None = None,
) -> list[list[int]]:
    """Continues every prompt until a stop token or ``max_new_tokens``.

    A row's result does not depend on the other rows, on the padding or on ``batch_size`` (up to
    the rounding of differently shaped products). Compiled once per (apply, batch size, padded
    length, max_new_tokens); hand in the *same* ``apply`` object each time. Unrolled layers compile
    longer but decode faster: a scan copies the weights of each layer at every step.

    Args:
        model: a ``Decoder`` or a ``Gpt2``, in either layout.
        params: its parameters; leaves may be boxed kernels.
        prompts: token ids, of any lengths.
        max_new_tokens: at least 1.
        eos_ids: tokens that end a row; the token itself is not returned.
        temperature: 0 is greedy; else the logits are divided by it and a token is drawn.
        top_k: draw from this many likeliest tokens.
        top_p: draw from the likeliest tokens that hold this much probability.
        key: a typed PRNG key, needed unless greedy. Row ``i`` draws from ``fold_in(key, i)``.
        batch_size: rows per compiled call; None: all prompts at once.
        pad_to: prompt lengths are rounded up to a multiple of it.
        apply: stands in for ``model.apply``, an intercepted one say.
        pixels: for an ``InternVL`` the tiles of every prompt's images, (tiles, height, width,
            channels) each and as many as its image tokens need; of all prompts the most tiles
            decide what is compiled. None: no prompt has an image.

    Returns:
        The new tokens of every prompt, in order.

    Raises:
        ConfigError: an impossible setting.
        DataError: a prompt that is empty, outside the vocabulary or too long.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import Decoder, DecoderConfig, generate
        >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> model = Decoder(config, scan_layers=True)
        >>> params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), int))["params"]
        >>> replies = generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5, pad_to=4)
        >>> [len(reply) for reply in replies]
        [5, 5]
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, key, batch_size, pad_to)
    check_prompts(model.config, prompts, max_new_tokens)
    if pixels is not None:
        for row, (prompt, tiles) in enumerate(zip(prompts, pixels, strict=True), 1):
            check_images(model.config, np.asarray([prompt]), [len(tiles)], [f"prompt {row}"])
    if not len(prompts):
        return []
    rows = len(prompts) if batch_size is None else batch_size
    sampling: dict[str, Any] = {}  # empty: greedy
    if temperature > 0.0:
        assert key is not None
        sampling = {"temperature": jnp.float32(temperature)}
        if top_p is not None:
            sampling["top_p"] = jnp.float32(top_p)
    # -1 is no token; a fixed number of stop tokens keeps one compiled program for most uses.
    stops = np.full(-(-max(len(eos_ids), 1) // 8) * 8, -1, np.int32)
    stops[: len(eos_ids)] = list(eos_ids)
    replies: list[list[int]] = []
    for first in range(0, len(prompts), rows):
        batch = prompts[first : first + rows]
        tokens, positions = pad_prompts(batch, rows=rows, pad_to=pad_to)
        images = {} if pixels is None else _tiles(pixels, first, rows)
        if sampling:
            sampling["keys"] = row_keys(key, first + jnp.arange(rows))
        new, counts = _generate_batch(
            params,
            tokens,
            positions,
            stops,
            sampling,
            images,
            apply=model.apply if apply is None else apply,
            config=model.config,
            dtype=jnp.dtype(model.dtype),
            max_new_tokens=max_new_tokens,
            top_k=top_k if sampling else None,
        )
        new, counts = np.asarray(new), np.asarray(counts)
        replies += [new[row, : counts[row]].tolist() for row in range(len(batch))]
    return replies


def _tiles(pixels: Sequence[np.ndarray], first: int, rows: int) -> dict[str, np.ndarray]:
    """Tiles of one batch, those that a row lacks as zeros; nothing if no prompt has any."""
    most = max(len(tiles) for tiles in pixels)
    if most == 0:
        return {}
    shape = next(tiles.shape[1:] for tiles in pixels if len(tiles))
    batch = np.zeros((rows, most, *shape), np.float32)
    for row, tiles in enumerate(pixels[first : first + rows]):
        batch[row, : len(tiles)] = tiles if len(tiles) else 0
    return {"pixels": batch}


@jax.jit
def row_keys(key: Array, rows: Array) -> Array:
    """The key of every row."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@functools.partial(jax.jit, static_argnames="top_k")
def choose_token(
    logits: Array,
    keys: Array | None,
    step: Array,
    *,
    temperature: Array | None = None,
    top_k: int | None = None,
    top_p: Array | None = None,
) -> Array:
    """The next token of every row: the likeliest, or with keys one that is drawn.

    Args:
        logits: (B, V).
        keys: (B,) of ``row_keys``, or None.
        step: number of the new token, folded into the keys.
        temperature: see ``generate``.
        top_k: see ``generate``.
        top_p: see ``generate``.

    Returns:
        (B,) int32.
    """
    if keys is None or temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return sample_tokens(keys, logits, temperature=temperature, top_k=top_k, top_p=top_p)


@functools.partial(jax.jit, static_argnames=("apply", "config", "dtype", "max_new_tokens", "top_k"))
def _generate_batch(
    params, tokens, positions, stops, sampling, images,
    *, apply, config, dtype, max_new_tokens, top_k,
):  # fmt: skip
    """(tokens (B, max_new_tokens), how many of them each row keeps (B,))."""
    batch, length = tokens.shape
    variables = {"params": params}

    def choose(logits, step):
        if not sampling:
            return choose_token(logits, None, step)
        return choose_token(
            logits,
            sampling["keys"],
            step,
            temperature=sampling["temperature"],
            top_k=top_k,
            top_p=sampling.get("top_p"),
        )

    def accept(state, logits, cache):
        token = choose(logits[:, -1], state["step"])
        done = state["done"] | jnp.any(token[:, None] == stops, axis=-1)
        return {
            "step": state["step"] + 1,
            "token": token,
            "position": state["position"] + 1,
            "new": jax.lax.dynamic_update_slice(state["new"], token[:, None], (0, state["step"])),
            "count": state["count"] + ~done,
            "done": done,
            "cache": cache,
        }

    def advance(state):
        logits, cache = apply(
            variables,
            state["token"][:, None],
            state["position"][:, None],
            state["cache"],
            method="decode",
        )
        return accept(state, logits, cache)

    def unfinished(state):
        return (state["step"] < max_new_tokens) & ~jnp.all(state["done"])

    start = {
        "step": jnp.int32(0),
        "position": positions[:, -1],
        "new": jnp.zeros((batch, max_new_tokens), jnp.int32),
        "count": jnp.zeros(batch, jnp.int32),
        "done": positions[:, -1] < 0,  # a row without a prompt
    }
    cache = init_cache(config, batch, length, dtype)
    logits, cache = apply(
        variables, tokens, positions, cache, last_only=True, method="decode", **images
    )
    # The last new token is never read back, so it needs no slot.
    state = accept(start, logits, grow_cache(cache, length + max_new_tokens - 1))
    state = jax.lax.while_loop(unfinished, advance, state)
    return state["new"], state["count"]


def check_settings(max_new_tokens, temperature, top_k, top_p, key, batch_size, pad_to) -> None:
    """Refuses impossible settings of ``generate``."""
    wrong = None
    if max_new_tokens < 1:
        wrong = f"max_new_tokens={max_new_tokens}; it must be at least 1"
    elif not temperature >= 0.0:
        wrong = f"temperature={temperature}; it must be 0 (greedy) or above"
    elif top_k is not None and top_k < 1:
        wrong = f"top_k={top_k}; it must be at least 1, or None"
    elif top_p is not None and not 0.0 < top_p <= 1.0:
        wrong = f"top_p={top_p}; it must lie in (0, 1], or be None"
    elif temperature > 0.0 and key is None:
        wrong = f"temperature={temperature} without a key; pass key=jax.random.key(seed)"
    elif batch_size is not None and batch_size < 1:
        wrong = f"batch_size={batch_size}; it must be at least 1, or None"
    elif pad_to < 1:
        wrong = f"pad_to={pad_to}; it must be at least 1"
    if wrong:
        raise ConfigError(f"Generation was asked for with {wrong}.")
