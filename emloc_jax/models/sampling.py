"""Choosing the next token from its logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["sample_tokens"]


def sample_tokens(
    keys: Array,
    logits: Array,
    *,
    temperature: float | Array,
    top_k: int | None = None,
    top_p: float | Array | None = None,
) -> Array:
    """One token per row from ``softmax(logits / temperature)``, cut to its likeliest tokens.

    First to the ``top_k`` likeliest, then to the smallest set of these that holds ``top_p`` of
    their probability (nucleus sampling; Holtzman et al. 2020, arXiv 1904.09751).

    Args:
        keys: (B,) typed PRNG keys; a row's token depends on its own key and logits only.
        logits: (B, V) fp32.
        temperature: above 0.
        top_k: number of tokens to choose from; None: all. Static.
        top_p: probability to choose from, in (0, 1]; None: all.

    Returns:
        (B,) int32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import sample_tokens
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> logits = jnp.array([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])
        >>> sample_tokens(keys, logits, temperature=1.0, top_k=1).tolist()
        [1, 0]
    """
    logits = logits / temperature
    if top_k is None and top_p is None:
        return _categorical(keys, logits)
    vocab = logits.shape[-1]
    logits, tokens = jax.lax.top_k(logits, vocab if top_k is None else min(top_k, vocab))
    if top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest token has nothing before it and always stays.
        logits = jnp.where((before < top_p).at[:, 0].set(True), logits, -jnp.inf)
    choice = _categorical(keys, logits)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _categorical(keys: Array, logits: Array) -> Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
