"""The state that a training step carries on: what is trained, and all that belongs to it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

__all__ = ["TrainState", "init_state"]


@struct.dataclass
class TrainState:
    """Everything that changes from step to step; frozen parameters are not in it.

    Attributes:
        step: () int32, steps done, skipped ones included.
        skipped: () int32, steps whose loss or gradient was not finite and that changed nothing.
        trainables: any pytree of floating-point arrays (adapters, or all parameters).
        opt_state: state of the Optax transformation.
        rng: base key; the key of a step is a function of it and of `step`.
    """

    step: jax.Array
    skipped: jax.Array
    trainables: Any
    opt_state: Any
    rng: jax.Array


def init_state(
    trainables: Any,
    tx: optax.GradientTransformation,
    *,
    seed: int | jax.Array = 0,
    copy: bool = True,
) -> TrainState:
    """The state before the first step.

    Args:
        trainables: what is trained.
        tx: the optimizer.
        seed: an integer, or a typed key.
        copy: copy `trainables`, since a step consumes its state. False saves their memory: the
            state holds the very arrays, and after the first step they are gone.

    Example:
        >>> state = init_state({"bias": jnp.zeros(2)}, optax.sgd(0.1))
        >>> int(state.step), int(state.skipped)
        (0, 0)
    """
    # A copy with its dtype spelt out: weakly typed leaves would cost a second compilation.
    trainables = jax.tree.map(
        lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype, copy=copy), trainables
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        trainables=trainables,
        opt_state=tx.init(trainables),
        rng=jax.random.key(seed) if isinstance(seed, int) else jnp.array(seed),
    )
