"""One random key per kernel, from its path alone."""

import hashlib
import math

import jax
import jax.numpy as jnp

__all__ = ["path_key", "stacked_keys"]


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Folds a stable hash of `path` into `key`.

    So what one kernel draws does not depend on which other kernels draw, nor on the process.

    Args:
      key: typed key (`jax.random.key`) or legacy uint32 key.
      path: of the kernel.

    Returns:
      A typed key.

    Example:
      >>> key = jax.random.key(0)
      >>> bool(path_key(key, "a") == path_key(key, "a")), bool(path_key(key, "a") == key)
      (True, False)
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "little"))


def stacked_keys(key: jax.Array, stack_shape: tuple[int, ...]) -> jax.Array:
    """One key per layer of a stacked kernel, shape `stack_shape`; `key` itself if unstacked.

    Example:
      >>> stacked_keys(jax.random.key(0), (2, 3)).shape
      (2, 3)
    """
    return (
        jax.random.split(key, math.prod(stack_shape)).reshape(stack_shape) if stack_shape else key
    )
