"""Generation by a model that is read a block at a time: every token walks over all blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.kernels import intercept
from emloc_jax.models import (
    BlockSource,
    CausalModel,
    check_prompts,
    check_settings,
    choose_token,
    grow_cache,
    init_cache,
    pad_prompts,
    row_keys,
)
from emloc_jax.streaming._walk import walk

__all__ = ["stream_generate"]


def stream_generate(
    model: CausalModel,
    source: BlockSource,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    pad_to: int = 64,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt, as `generate` does, with a block or two of the model in memory.

    All parameters are read once per token, so batches should be as large as the cache allows. The
    key/value cache of all blocks stays on the device.

    Args:
      model: the linen module.
      source: of its parameters, the original's or an emulator's, with or without adapters.
      prompts, max_new_tokens, eos_ids, temperature, top_k, top_p, key, batch_size, pad_to: see
        `generate`.
      on_token: called with the number of tokens done, over all batches.

    Returns:
      The new tokens of every prompt, in order; greedy ones are those of `generate`.

    Raises:
      ConfigError, DataError: see `generate`.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, key, batch_size, pad_to)
    check_prompts(model.config, prompts, max_new_tokens)
    rows = len(prompts) if batch_size is None else batch_size
    sampling: dict[str, Any] = {}  # empty: greedy
    if temperature > 0.0:
        sampling = {"temperature": jnp.float32(temperature), "top_k": top_k}
        if top_p is not None:
            sampling["top_p"] = jnp.float32(top_p)
    outer = jax.device_put(source.outer())
    parts = _Parts(model)
    replies: list[list[int]] = []
    done = 0
    for first in range(0, len(prompts), max(rows, 1)):
        batch = prompts[first : first + rows]
        tokens, positions = pad_prompts(batch, rows=rows, pad_to=pad_to)
        keys = row_keys(key, first + jnp.arange(rows)) if sampling else None
        cache = _Cache(model, rows, tokens.shape[1])
        logits = cache.advance(parts, source, outer, tokens, positions)
        cache.grow(tokens.shape[1] + max_new_tokens - 1)
        new: list[np.ndarray] = []
        finished, position = positions[:, -1] < 0, positions[:, -1]
        counts = np.zeros(rows, int)
        while True:
            token = np.asarray(choose_token(logits[:, -1], keys, jnp.int32(len(new)), **sampling))
            finished = finished | np.isin(token, np.asarray(eos_ids, np.int64))
            counts += ~finished
            new.append(token)
            done += 1
            if on_token is not None:
                on_token(done)
            if len(new) == max_new_tokens or finished.all():
                break
            position = position + 1
            logits = cache.advance(parts, source, outer, token[:, None], position[:, None])
        table = np.stack(new, axis=1)
        replies += [table[row, : counts[row]].tolist() for row in range(len(batch))]
    return replies


class _Parts:
    """The compiled parts of one step."""

    def __init__(self, model: CausalModel):
        apply, block = intercept(model.apply), intercept(model.block().apply)

        def decode(params: Any, x: Any, kept: Any, slot: Any, context: Any) -> Any:
            return block({"params": params}, x, kept, 0, slot, context, method="decode")

        self.embed = jax.jit(lambda o, t, p: apply({"params": o}, t, p, method="embed"))
        self.block = jax.jit(decode, donate_argnums=2)
        self.head = jax.jit(lambda o, x: apply({"params": o}, x[:, -1:], method="head"))
        self.context = jax.jit(model.cache_context)


class _Cache:
    """Keys and values of every block, each in arrays of its own."""

    def __init__(self, model: CausalModel, rows: int, slots: int):
        whole = jax.eval_shape(lambda: init_cache(model.config, rows, slots, model.dtype))
        shape = (1, *whole["k"].shape[1:])
        self._kept = [
            (jnp.zeros(shape, whole["k"].dtype), jnp.zeros(shape, whole["v"].dtype))
            for _ in range(model.config.num_layers)
        ]
        self._positions = jnp.full((rows, slots), -1, jnp.int32)
        self._length = 0

    def grow(self, slots: int) -> None:
        """Makes room for more tokens."""
        one = {"positions": self._positions, "length": jnp.int32(self._length)}
        grown: list[Any] = []
        for keys, values in self._kept:
            cache = grow_cache(one | {"k": keys, "v": values}, slots)
            grown.append((cache["k"], cache["v"]))
            self._positions = cache["positions"]
        self._kept = grown

    def advance(
        self, parts: _Parts, source: BlockSource, outer: Any, tokens: Any, positions: Any
    ) -> jax.Array:
        """Logits of the last of the new tokens, which see the cache and are written into it."""
        slot, positions = jnp.int32(self._length), jnp.asarray(positions, jnp.int32)
        self._positions = jax.lax.dynamic_update_slice(self._positions, positions, (0, slot))
        context = parts.context(positions, self._positions)
        x = parts.embed(outer, jnp.asarray(tokens), positions)
        for index, params in walk(source, range(source.num_blocks)):
            x, self._kept[index] = parts.block(params, x, self._kept[index], slot, context)
        self._length += positions.shape[1]
        return parts.head(outer, x)
