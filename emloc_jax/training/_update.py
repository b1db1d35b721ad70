"""From sums of gradients to the next state: what every way of training shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emloc_jax.errors import ConfigError
from emloc_jax.training._state import TrainState

__all__ = ["Update", "cut_batch", "make_update"]

Update = Callable[[TrainState, jax.Array, jax.Array, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_update(
    tx: optax.GradientTransformation,
    *,
    clip: float | None = 1.0,
    schedule: optax.Schedule | None = None,
) -> Update:
    """`update(state, total, weight, gradient) -> (state, metrics)`, to be compiled by its caller.

    With fp32 sums over all micro-batches of a step, it applies gradient / weight, scaled to a
    global norm of at most `clip`. If the loss or the gradient is not finite nothing but the
    counters changes. Metrics are those of `make_train_step`.

    Args:
        tx: the optimizer.
        clip: largest global gradient norm, or `None`.
        schedule: learning rates to report; those applied are `tx`'s own.

    Raises:
        ConfigError: `clip` is not positive.

    Example:
        >>> from emloc_jax.training import init_state
        >>> tx = optax.sgd(0.5)
        >>> state = init_state({"w": jnp.zeros(())}, tx)
        >>> total, weight, gradient = jnp.float32(4), jnp.float32(2), {"w": jnp.float32(-4)}
        >>> state, metrics = make_update(tx, clip=None)(state, total, weight, gradient)
        >>> float(metrics["loss"]), float(state.trainables["w"])
        (2.0, 1.0)
    """
    if clip is not None and clip <= 0:
        raise ConfigError(f"clip is {clip}; it must be positive, or None.")

    def update(
        state: TrainState, total: jax.Array, weight: jax.Array, gradient: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        mean = total / weight
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        if clip is not None:
            scale = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            gradient = jax.tree.map(lambda g: g * scale, gradient)
        gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, state.trainables)
        updates, opt_state = tx.update(gradient, state.opt_state, state.trainables)
        trainables = optax.apply_updates(state.trainables, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
        metrics = {
            "loss": mean,
            "weight": weight,
            "grad_norm": norm,
            "finite": finite,
            "skipped": skipped,
        }
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(
                schedule(state.step - state.skipped), jnp.float32
            )
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            skipped=skipped,
            trainables=keep(trainables, state.trainables),
            opt_state=keep(opt_state, state.opt_state),
        )
        return state, metrics

    return update


def cut_batch(array: Any, parts: int) -> Any:
    """Cuts the first axis into equal micro-batches: (B, …) to (parts, B / parts, …).

    Raises:
        ConfigError: the batch cannot be cut evenly.

    Example:
        >>> cut_batch(jnp.ones((6, 4)), 3).shape
        (3, 2, 4)
    """
    if array.shape[0] % parts:
        raise ConfigError(
            f"a batch of {array.shape[0]} sequences cannot be cut into {parts} equal "
            "micro-batches; make batch_size a multiple of accumulation."
        )
    return array.reshape(parts, array.shape[0] // parts, *array.shape[1:])
