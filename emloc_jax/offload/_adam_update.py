"""AdamW on all gradients of a block at once, for either side of the link."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emloc_jax.offload._adam import AdamOptions, SubspaceMoments, adam_direction, all_finite
from emloc_jax.offload._alone_jit import AloneJit

__all__ = ["Update", "adam_update", "host_update"]


class Update(NamedTuple):
    """What goes back to the device.

    Attributes:
      deltas: path to change, learning rate included, in the wire's dtype.
      decay: () fp32, learning rate times weight decay; zero if nothing is to change.
    """

    deltas: dict[str, jax.Array]
    decay: jax.Array


def adam_update(
    gradients: Mapping[str, jax.Array],
    moments: Mapping[str, SubspaceMoments],
    rate: jax.Array,
    scale: jax.Array,
    *,
    adam: AdamOptions,
    wire: Any,
) -> tuple[Update, dict[str, SubspaceMoments]]:
    """One step of AdamW on the gradients of a block, `scale` times what is given.

    If one of them is not finite, nothing changes.
    """
    gradients = {path: g.astype(jnp.float32) for path, g in gradients.items()}
    finite = jnp.isfinite(scale) & all_finite(gradients)
    deltas, kept = {}, {}
    for path, gradient in gradients.items():
        direction, new = adam_direction(gradient * scale, moments[path], adam)
        deltas[path] = jnp.where(finite, -rate * direction, 0.0).astype(wire)
        kept[path] = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, moments[path])
    decay = jnp.where(finite, rate * adam.weight_decay, 0.0)
    return Update(deltas, decay), kept


def host_update(adam: AdamOptions, wire: Any) -> Callable[..., Any]:
    """`adam_update` compiled for the host's CPU, with its moments updated in place."""
    cpu = jax.local_devices(backend="cpu")[0]
    compiled = AloneJit(
        functools.partial(adam_update, adam=adam, wire=wire), donate_argnames="moments"
    )

    def update(gradients: Any, moments: Any, rate: float, scale: float) -> Any:
        with jax.default_device(cpu):
            result = compiled(gradients, moments, jnp.float32(rate), jnp.float32(scale))
            return jax.block_until_ready(result)

    return update
