"""Cross-entropy of the next token, computed without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emloc_jax.errors import ConfigError

__all__ = ["Loss", "chunked_cross_entropy", "make_head_loss", "make_loss"]

Loss = Callable[[Any, Mapping[str, Any]], tuple[jax.Array, jax.Array]]


def chunked_cross_entropy(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Σᵢ wᵢ (logsumexp(zᵢ) − zᵢ[tᵢ]) with z = logits_fn(hidden), and Σᵢ wᵢ.

    Tokens are taken `chunk` at a time, and each chunk's logits are computed again in the backward
    pass, so that at most `chunk · V` logits live at once.

    Args:
        logits_fn: (n, D) hidden states to (n, V) logits; may close over parameters.
        hidden: (…, D) final hidden states.
        targets: (…) int32 next tokens.
        weights: (…) weights of the targets.
        chunk: tokens per chunk, at least 1.

    Returns:
        Loss sum and weight sum, both fp32 scalars. The mean loss is their quotient; sums of
        several batches may be added before dividing.

    Raises:
        ConfigError: `chunk` is not positive.

    Example:
        >>> hidden, head = jnp.ones((3, 2)), jnp.zeros((2, 5))
        >>> targets, weights = jnp.array([1, 2, 3]), jnp.array([1.0, 1.0, 0.0])
        >>> total, weight = chunked_cross_entropy(
        ...     lambda h: h @ head, hidden, targets, weights, chunk=2
        ... )
        >>> print(f"{total / weight:.4f}, ln 5 = {jnp.log(5):.4f}")
        1.6094, ln 5 = 1.6094
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; a chunk holds at least 1 token.")
    count = targets.size
    chunks = -(-count // chunk)
    size = -(-count // chunks)  # as even as possible, so that little padding is added
    padding = (0, chunks * size - count)
    hidden = jnp.pad(hidden.reshape(count, -1), (padding, (0, 0)))
    targets = jnp.pad(targets.reshape(count), padding)
    weights = jnp.pad(weights.reshape(count).astype(jnp.float32), padding)

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(chunks, size, *array.shape[1:])

    def add(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, t, w = piece
        logits = logits_fn(h).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, t)
        return total + jnp.sum(jnp.where(w == 0, 0.0, losses * w)), None

    # Inside a scan the compiler cannot merge the two forward passes, so no barrier is needed.
    body = jax.checkpoint(add, prevent_cse=False)
    pieces = (split(hidden), split(targets), split(weights))
    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), pieces)
    return total, jnp.sum(weights)


def make_loss(apply: Callable[..., Any], *, chunk: int = 256) -> Loss:
    """The loss of a language model that has the methods `hidden` and `logits`.

    Args:
        apply: `model.apply`, or an intercepted one. `method='hidden'` takes tokens (B, T) with
            `positions` and `segments` to hidden states (B, T, D); `method='logits'` takes (n, D)
            to (n, V). It is given `pixels` too if the batch has them.
        chunk: tokens whose logits live at once.

    Returns:
        `loss(params, batch)`, giving the fp32 loss sum and weight sum of a batch with `tokens`,
        `targets`, `weights` and, if it has them, `positions` and `segments`.

    Example:
        >>> def apply(variables, x, positions=None, segments=None, *, method):
        ...     return jax.nn.one_hot(x, 4) if method == "hidden" else x @ variables["params"]
        >>> ids = jnp.array([[1, 2, 3]])
        >>> batch = {"tokens": ids, "targets": ids, "weights": jnp.ones((1, 3))}
        >>> total, weight = make_loss(apply)(jnp.zeros((4, 4)), batch)
        >>> print(f"{total / weight:.4f}, ln 4 = {jnp.log(4):.4f}")
        1.3863, ln 4 = 1.3863
    """

    def loss(params: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params}
        hidden = apply(
            variables,
            batch["tokens"],
            positions=batch.get("positions"),
            segments=batch.get("segments"),
            method="hidden",
            # A model that reads no images need not know the word.
            **({"pixels": batch["pixels"]} if "pixels" in batch else {}),
        )
        return chunked_cross_entropy(
            lambda h: apply(variables, h, method="logits"),
            hidden,
            batch["targets"],
            batch["weights"],
            chunk=chunk,
        )

    return loss


def make_head_loss(apply: Callable[..., Any], *, chunk: int = 256) -> Callable[..., Any]:
    """The same loss from the last block's output on, for trainers that walk a block stack.

    Args:
        apply: `model.apply` of a causal language model here, or an intercepted one.
        chunk: tokens whose logits live at once.

    Returns:
        `head_loss(outer, x, batch) -> (loss sum, weight sum)`, with `outer` the parameters outside
        the blocks and x (B, T, D) what the last block returned.
    """

    def head_loss(outer: Any, x: jax.Array, batch: Mapping[str, Any]) -> Any:
        variables = {"params": outer}
        hidden = apply(variables, x, method=lambda model, x: model.norm(x))
        return chunked_cross_entropy(
            lambda h: apply(variables, h, method="logits"),
            hidden,
            batch["targets"],
            batch["weights"],
            chunk=chunk,
        )

    return head_loss
