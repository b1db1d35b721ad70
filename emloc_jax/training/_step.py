"""One compiled optimizer step: exact accumulation, clipping, refusal of non-finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emloc_jax._compiling import LoopJit
from emloc_jax.errors import ConfigError
from emloc_jax.training._loss import Loss
from emloc_jax.training._state import TrainState
from emloc_jax.training._update import cut_batch, make_update

__all__ = ["Combine", "TrainStep", "make_train_step"]

Combine = Callable[[Any, Any, jax.Array], Any]
TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def train_everything(trainables: Any, frozen: Any, key: jax.Array) -> Any:
    """The trainables themselves are the parameters (full fine-tuning)."""
    del frozen, key
    return trainables


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    combine: Combine = train_everything,
    accumulation: int = 1,
    clip: float | None = 1.0,
    schedule: optax.Schedule | None = None,
) -> TrainStep:
    """A compiled `step(state, frozen, batch) -> (state, metrics)` that consumes its state.

    The batch is cut into `accumulation` micro-batches along its first axis. With (Lₘ, wₘ) the loss
    and weight sums of micro-batch m, the gradient is Σₘ ∇Lₘ / Σₘ wₘ: exactly that of the whole
    batch, however the learnt tokens are spread. It is scaled to a global norm of at most `clip`.
    If the loss or the gradient is not finite nothing but the counters changes, and
    `metrics['finite']` is False.

    Args:
        loss: `loss(params, batch) -> (sum, weight)`, as by `make_loss`.
        tx: the optimizer.
        combine: `combine(trainables, frozen, key) -> params`; attaches adapters to frozen
            parameters, with the key for dropout. Each micro-batch of each step has its own key.
        accumulation: micro-batches per step.
        clip: largest global gradient norm, or `None`.
        schedule: learning rates to report; those applied are `tx`'s own.

    Returns:
        A jitted function. `frozen` is an argument (any pytree, or `None`), so it is neither copied
        into the program nor consumed. Metrics are scalars: `loss` (mean over learnt tokens),
        `weight`, `grad_norm` (before clipping), `finite`, `skipped` (steps so far that were not
        finite) and, with a schedule, `learning_rate`.

    Raises:
        ConfigError: an impossible option, or a batch that cannot be cut evenly.

    Example:
        >>> from emloc_jax.training import init_state
        >>> def loss(params, batch):
        ...     return jnp.sum((params["w"] - batch["x"]) ** 2), jnp.float32(batch["x"].size)
        >>> tx = optax.sgd(0.5)
        >>> step = make_train_step(loss, tx, clip=None, accumulation=2)
        >>> state, metrics = step(init_state({"w": jnp.zeros(())}, tx), None, {"x": jnp.ones(4)})
        >>> float(metrics["loss"]), float(state.trainables["w"])
        (1.0, 1.0)
    """
    if accumulation < 1 or (clip is not None and clip <= 0):
        raise ConfigError(
            f"accumulation is {accumulation} and clip {clip}; accumulation must be at least 1 and "
            "clip positive, or None."
        )
    update = make_update(tx, clip=clip, schedule=schedule)

    def gradient_sums(state: TrainState, frozen: Any, batch: Any, key: jax.Array) -> Any:
        def objective(trainables: Any) -> tuple[jax.Array, jax.Array]:
            return loss(combine(trainables, frozen, key), batch)

        (total, weight), gradient = jax.value_and_grad(objective, has_aux=True)(state.trainables)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (total, weight, gradient))

    def step(
        state: TrainState, frozen: Any, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.rng, state.step)
        if accumulation == 1:
            total, weight, gradient = gradient_sums(
                state, frozen, batch, jax.random.fold_in(key, 0)
            )
        else:
            micro = jax.tree.map(lambda x: cut_batch(x, accumulation), dict(batch))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainables)
            zero = jnp.zeros((), jnp.float32)

            def add(sums: Any, item: Any) -> tuple[Any, None]:
                index, part = item
                new = gradient_sums(state, frozen, part, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, sums, new), None

            items = (jnp.arange(accumulation), micro)
            (total, weight, gradient), _ = jax.lax.scan(add, (zero, zero, zeros), items)

        return update(state, total, weight, gradient)

    return LoopJit(step, donate_argnums=0)
