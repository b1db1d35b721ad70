"""The flow-matching loss: what a picture half in noise should move by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.training._loss import Loss

__all__ = ["make_flow_loss", "noisy_latents"]


def noisy_latents(latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """`(1 - t) · latents + t · noise`: the straight way from a picture to noise.

    Rectified flow: Liu et al. 2022, arXiv 2209.03003; flow matching: Lipman et al. 2022,
    arXiv 2210.02747.

    Args:
        latents: (B, …).
        noise: the same.
        timesteps: (B,).

    Returns:
        (B, …).

    Example:
        >>> noisy_latents(jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.array([0.0, 0.25])).tolist()
        [[0.0], [0.25]]
    """
    times = timesteps.reshape(-1, *(1,) * (latents.ndim - 1))
    return (1 - times) * latents + times * noise


def make_flow_loss(apply: Callable[..., Any]) -> Loss:
    """The loss of a model that predicts velocities, such as `models.Flux`.

    Of each picture it is the mean over tokens and channels of
    `(velocity(noisy latents, t) - (noise - latents))²`, in fp32. Noise and times come with the
    batch (see `FlowBatches`), so the loss is a function of its arguments and nothing else.

    Args:
        apply: `model.apply`, or an intercepted one, called as `Flux` is.

    Returns:
        `loss(params, batch)`, giving the loss summed over pictures, and their number, of a batch
        with `latents` and `noise` (B, T, C), `timesteps` (B,), `prompt_embeds` (B, S, E),
        `pooled_prompt_embeds` (B, P), `image_ids` (B, T, axes) and, if it has them, `guidance`
        (B,) and `weights` (B,).

    Example:
        >>> def apply(variables, latents, *conditions, guidance=None):
        ...     return variables["params"] * latents
        >>> x = jnp.ones((2, 3, 4))
        >>> batch = {"latents": x, "noise": -x, "timesteps": jnp.array([0.0, 0.5])}
        >>> names = ("prompt_embeds", "pooled_prompt_embeds", "image_ids")
        >>> batch |= {name: None for name in names}
        >>> total, weight = make_flow_loss(apply)(-2.0, batch)
        >>> float(total), float(weight)
        (4.0, 2.0)
    """

    def loss(params: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        latents, noise = (batch[key].astype(jnp.float32) for key in ("latents", "noise"))
        velocity = apply(
            {"params": params},
            noisy_latents(latents, noise, batch["timesteps"]),
            batch["timesteps"],
            batch["prompt_embeds"],
            batch["pooled_prompt_embeds"],
            batch["image_ids"],
            guidance=batch.get("guidance"),
        )
        squares = (velocity.astype(jnp.float32) - (noise - latents)) ** 2
        losses = squares.mean(axis=tuple(range(1, squares.ndim)))
        weights = batch.get("weights")
        weights = jnp.ones_like(losses) if weights is None else weights.astype(jnp.float32)
        return jnp.sum(jnp.where(weights == 0, 0.0, losses * weights)), jnp.sum(weights)

    return loss
