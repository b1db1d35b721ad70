"""AdamW with decoupled weight decay, and a schedule of linear warm-up and cosine decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.typing
import optax

from emloc_jax.errors import ConfigError

__all__ = ["decays", "make_optimizer", "make_schedule"]


def make_schedule(
    peak: float, *, steps: int, warmup: int = 0, final: float = 0.0
) -> optax.Schedule:
    """Learning rates that rise linearly for `warmup` steps, then follow half a cosine.

    With t counted from 0: peak · (t + 1) / warmup while t < warmup, then
    peak · (final + (1 − final) · (1 + cos(π (t − warmup) / (steps − warmup))) / 2).

    Args:
        peak: the largest rate.
        steps: length of the whole run.
        warmup: steps of warm-up.
        final: rate at the end, as a fraction of `peak`.

    Raises:
        ConfigError: lengths or rates that make no schedule.

    Example:
        >>> schedule = make_schedule(1.0, steps=6, warmup=2)
        >>> [round(float(schedule(t)), 2) for t in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if peak <= 0 or not 0 <= warmup < steps or not 0 <= final <= 1:
        raise ConfigError(
            f"learning rate {peak}, warm-up {warmup} of {steps} steps, final fraction {final}: "
            "the rate must be positive, the warm-up shorter than the run, the fraction in [0, 1]."
        )
    cosine = optax.cosine_decay_schedule(peak, steps - warmup, alpha=final)
    if warmup == 0:
        return cosine
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, cosine], [warmup])


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    decay_mask: Any | Callable[[Any], Any] | None = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2019); clipping is the training step's task.

    Args:
        learning_rate: a rate, or a schedule (`make_schedule`).
        weight_decay: decoupled decay, times the learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: term added to the denominator.
        decay_mask: tree of booleans, or a function from trainables to one; by default `decays`.
        moment_dtype: dtype of the first moment; by default the trainables'.

    Raises:
        ConfigError: a rate or decay out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = make_optimizer(0.1)
        >>> w = {"w": jnp.ones(1)}
        >>> updates, _ = tx.update(w, tx.init(w), w)
        >>> round(float(updates["w"][0]), 4)
        -0.1
    """
    if not callable(learning_rate) and learning_rate <= 0:
        raise ConfigError(f"the learning rate is {learning_rate}; it must be positive.")
    if weight_decay < 0 or not (0 <= b1 < 1 and 0 <= b2 < 1) or eps <= 0:
        raise ConfigError(
            f"weight_decay {weight_decay}, b1 {b1}, b2 {b2}, eps {eps}: the decay must not be "
            "negative, b1 and b2 lie in [0, 1), eps be positive."
        )
    return optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        mu_dtype=moment_dtype,
        weight_decay=weight_decay,
        mask=decays if decay_mask is None else decay_mask,
    )


def decays(trainables: Any) -> Any:
    """A tree of booleans: all decay but leaves named `scale` or `bias`, or inside of one.

    Names tell, since a stack of biases (one per scanned layer) has the rank of a matrix.

    Example:
        >>> decays({"dense": {"kernel": 1.0, "bias": 1.0}})
        {'dense': {'bias': False, 'kernel': True}}
        >>> decays({"dense/bias": {"value": 1.0}})
        {'dense/bias': {'value': False}}
    """

    def decay(path: Any, _: Any) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return not {"scale", "bias"} & set(names)

    return jax.tree.map_with_path(decay, trainables)
