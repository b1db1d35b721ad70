"""Pictures out of noise: Euler steps along the velocity of a flow-matching model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["euler_sample", "flow_velocity"]

Velocity = Callable[[jax.Array, jax.Array], jax.Array]

_CONDITIONS = ("prompt_embeds", "pooled_prompt_embeds")


def euler_sample(velocity: Velocity, noise: jax.Array, times: np.ndarray | jax.Array) -> jax.Array:
    """Walks from noise to pictures: `x ← x + (t' - t) · velocity(x, t)` for each time in turn.

    One program, whose loop body is the model; wrap the call into `jax.jit`.

    Args:
        velocity: (B, …) and a time () to (B, …), from `flow_velocity` say.
        noise: (B, …) standard normal.
        times: (steps + 1,) from 1 down to 0, by `sampling_times`.

    Returns:
        (B, …) in fp32.

    Example:
        >>> from emloc_jax.training import sampling_times
        >>> noise = jnp.array([[2.0]])
        >>> to_three = lambda x, t: (x - 3.0) / t  # straight ways to a picture that is 3
        >>> float(euler_sample(to_three, noise, sampling_times(5))[0, 0])
        3.0
    """
    times = jnp.asarray(times, jnp.float32)

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, then = pair
        return x + (then - now) * velocity(x, now).astype(jnp.float32), None

    start = jnp.asarray(noise, jnp.float32)
    return jax.lax.scan(step, start, (times[:-1], times[1:]))[0]


def flow_velocity(
    apply: Callable[..., Any],
    params: Any,
    conditions: Mapping[str, Any],
    *,
    negative: Mapping[str, Any] | None = None,
    scale: float = 1.0,
) -> Velocity:
    """The velocity of a model under given prompts.

    Args:
        apply: `model.apply` of `models.Flux`, or an intercepted one.
        params: its parameters, boxed or not.
        conditions: `prompt_embeds` (B, S, E), `pooled_prompt_embeds` (B, P), `image_ids` (T, axes)
            or (B, T, axes) and, where the model asks for it, `guidance` (B,).
        negative: `prompt_embeds` and `pooled_prompt_embeds` (B, …) of what the pictures should not
            be, for classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598). A model with
            guidance embeddings does without.
        scale: s in `negative + s · (prompted - negative)`.

    Returns:
        `velocity(x, t)` for `euler_sample`.

    Example:
        >>> apply = lambda variables, x, t, prompt, *others, guidance=None: prompt
        >>> given = {"prompt_embeds": jnp.ones(1), "pooled_prompt_embeds": None, "image_ids": None}
        >>> nothing = {"prompt_embeds": jnp.zeros(1), "pooled_prompt_embeds": None}
        >>> velocity = flow_velocity(apply, {}, given, negative=nothing, scale=3.0)
        >>> velocity(jnp.zeros(1), jnp.float32(1)).tolist()
        [3.0]
    """

    def run(x: jax.Array, time: jax.Array, prompts: Mapping[str, Any]) -> jax.Array:
        return apply(
            {"params": params},
            x,
            jnp.broadcast_to(time, x.shape[:1]),
            *(prompts[key] for key in _CONDITIONS),
            conditions["image_ids"],
            guidance=conditions.get("guidance"),
        )

    def velocity(x: jax.Array, time: jax.Array) -> jax.Array:
        prompted = run(x, time, conditions)
        if negative is None:
            return prompted
        unwanted = run(x, time, negative)
        return unwanted + scale * (prompted - unwanted)

    return velocity
