"""What a backward pass leaves of a block."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Gradients", "finish_gradients"]


class Gradients(NamedTuple):
    """What a backward pass leaves of one block.

    Attributes:
      host: path to gradient in the wire's dtype; cross the link.
      device: path to fp32 gradient of leaves that are updated on the device.
      squares: () fp32, sum of squares of all of them before rounding.
    """

    host: dict[str, jax.Array]
    device: dict[str, jax.Array]
    squares: jax.Array


def finish_gradients(
    gradients: Mapping[str, jax.Array], sent: list[str], kept: list[str], wire: Any
) -> Gradients:
    """Splits finished gradients by where they go."""
    squares = sum((jnp.sum(jnp.square(g)) for g in gradients.values()), jnp.float32(0))
    return Gradients(
        {path: gradients[path].astype(wire) for path in sent},
        {path: gradients[path] for path in kept},
        squares,
    )
