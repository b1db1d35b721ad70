"""Adam on plain arrays: the step of a compressed gradient, on the host or on the device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from emloc_jax.errors import ConfigError

__all__ = [
    "AdamOptions",
    "SubspaceMoments",
    "adam_direction",
    "all_finite",
    "checked_direction",
    "init_moments",
]


@dataclasses.dataclass(frozen=True)
class AdamOptions:
    """Adam's numbers (Kingma & Ba, 2015), with decoupled decay (Loshchilov & Hutter, 2019).

    Attributes:
      b1: decay of mu.
      b2: decay of nu.
      eps: added to the root of nu, outside of it.
      weight_decay: times learning rate and kernel. A kernel cannot be expressed in the subspace,
        so this is for whoever applies the step; `adam_direction` does not read it.

    Raises:
      ConfigError: a number out of range.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0 and self.weight_decay >= 0):
            raise ConfigError(
                f"{self}: b1 and b2 lie in [0, 1), eps is positive, weight_decay not negative."
            )


@struct.dataclass
class SubspaceMoments:
    """Adam's state for one array of any shape.

    Attributes:
      mu: running mean of the gradient.
      nu: running mean of its square.
      count: int32 scalar, steps taken.
    """

    mu: jax.Array
    nu: jax.Array
    count: jax.Array


def init_moments(shape: tuple[int, ...], dtype: Any = jnp.float32) -> SubspaceMoments:
    """Zero moments.

    Example:
      >>> init_moments((2, 3)).mu.shape
      (2, 3)
    """
    return SubspaceMoments(
        mu=jnp.zeros(shape, dtype), nu=jnp.zeros(shape, dtype), count=jnp.zeros((), jnp.int32)
    )


def adam_direction(
    g: jax.Array, moments: SubspaceMoments, options: AdamOptions
) -> tuple[jax.Array, SubspaceMoments]:
    """One step of Adam, without learning rate and sign.

        mu <- b1 mu + (1 - b1) g,    nu <- b2 nu + (1 - b2) g^2,
        direction = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps).

    Computes in fp32, as `optax.scale_by_adam` does, and stores the moments in their own dtype.

    Args:
      g: gradient, of the shape of the moments.
      moments: before the step.
      options: `weight_decay` is not used.

    Returns:
      The fp32 direction, and the moments after the step.

    Example:
      >>> direction, moments = adam_direction(jnp.array([3.0]), init_moments((1,)), AdamOptions())
      >>> round(float(direction[0]), 4), int(moments.count)
      (1.0, 1)
    """
    b1, b2 = options.b1, options.b2
    g = g.astype(jnp.float32)
    mu = (1 - b1) * g + b1 * moments.mu.astype(jnp.float32)
    nu = (1 - b2) * (g * g) + b2 * moments.nu.astype(jnp.float32)
    count = jnp.asarray(optax.safe_increment(moments.count))
    mu_hat = mu / jnp.asarray(1 - b1**count, jnp.float32)
    nu_hat = nu / jnp.asarray(1 - b2**count, jnp.float32)
    direction = mu_hat / (jnp.sqrt(nu_hat) + options.eps)
    return direction, SubspaceMoments(
        mu=mu.astype(moments.mu.dtype), nu=nu.astype(moments.nu.dtype), count=count
    )


def checked_direction(
    g: jax.Array, moments: SubspaceMoments, options: AdamOptions
) -> tuple[jax.Array, SubspaceMoments, jax.Array]:
    """`adam_direction` that takes no step on a gradient with a NaN or an infinity in it.

    Returns:
      Direction, moments, and whether `g` was finite. If not, the direction is zero and the moments
      are what they were; the caller counts.

    Example:
      >>> bad = jnp.array([1.0, jnp.nan])
      >>> direction, moments, finite = checked_direction(bad, init_moments((2,)), AdamOptions())
      >>> direction.tolist(), int(moments.count), bool(finite)
      ([0.0, 0.0], 0, False)
    """
    finite = all_finite(g)
    direction, after = adam_direction(g, moments, options)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, moments)
    return jnp.where(finite, direction, 0.0), kept, finite


def all_finite(tree: Any) -> jax.Array:
    """Whether no array of `tree` holds a NaN or an infinity; true without arrays."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)
