"""Storing fp32 results in narrow kernels without losing small steps."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from emloc_jax.errors import ConfigError

__all__ = ["Rounding", "check_rounding", "exact_kernel", "rounded_kernel", "rounding_state"]

Rounding = Literal["nearest", "stochastic", "kahan", "master"]


def rounding_state(kernel: jax.Array, rounding: Rounding) -> jax.Array | None:
    """What `apply_update` needs as `extra` before the first step.

    Returns:
      'kahan': zeros like the kernel; 'master': the kernel in fp32, a copy; else None.
    """
    if rounding == "kahan":
        return jnp.zeros_like(kernel)
    return jnp.array(kernel, jnp.float32, copy=True) if rounding == "master" else None


def exact_kernel(kernel: jax.Array, extra: jax.Array | None, rounding: Rounding) -> jax.Array:
    """The fp32 number that `kernel` and `extra` stand for together."""
    if rounding == "master" and extra is not None:
        return extra
    if rounding == "kahan" and extra is not None:
        return kernel.astype(jnp.float32) + extra.astype(jnp.float32)
    return kernel.astype(jnp.float32)


def rounded_kernel(
    exact: jax.Array, dtype: Any, extra_dtype: Any, rounding: Rounding, key: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Inverse of `exact_kernel`: the kernel in `dtype`, and `extra`."""
    if rounding == "stochastic" and dtype == jnp.bfloat16:
        assert key is not None
        return _stochastic(exact, key), None
    # A plain cast there and back may be dropped by XLA; this is what will really be stored.
    info = jnp.finfo(dtype)
    stored = jax.lax.reduce_precision(exact, info.nexp, info.nmant)
    extra = None
    if rounding == "kahan":
        extra = (exact - stored).astype(extra_dtype)
    elif rounding == "master":
        extra = exact
    return stored.astype(dtype), extra


def _stochastic(exact: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds fp32 to one of the two bf16 neighbours, with probabilities that keep the mean."""
    bits = jax.lax.bitcast_convert_type(exact, jnp.uint32)
    noise = jax.random.bits(key, exact.shape, jnp.uint16).astype(jnp.uint32)
    # bf16 is the upper half of fp32: a carry out of the lower half is a step away from zero.
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(exact), rounded, exact.astype(jnp.bfloat16))


def check_rounding(kernel: jax.Array, rounding: str, extra: Any, key: Any) -> None:
    """Raises ConfigError for an unknown rounding, or one without what it needs."""
    if rounding not in ("nearest", "stochastic", "kahan", "master"):
        raise ConfigError(
            f"Unknown rounding {rounding!r}; there are 'nearest', 'stochastic', 'kahan', 'master'."
        )
    if rounding == "stochastic" and key is None:
        raise ConfigError("Rounding 'stochastic' needs a PRNG key, a fresh one for every step.")
    if rounding == "stochastic" and kernel.dtype not in (jnp.bfloat16, jnp.float32):
        raise ConfigError(f"Rounding 'stochastic' knows bf16 and fp32 kernels, not {kernel.dtype}.")
    if rounding in ("nearest", "stochastic") and extra is not None:
        raise ConfigError(f"Rounding {rounding!r} keeps nothing between steps; drop `extra`.")
    if rounding in ("nearest", "stochastic"):
        return
    if extra is None or extra.shape != kernel.shape:
        found = None if extra is None else extra.shape
        raise ConfigError(
            f"Rounding {rounding!r} needs `extra` of the kernel's shape {kernel.shape}, found "
            f"{found}; `rounding_state` makes it."
        )
    if rounding == "master" and extra.dtype != jnp.float32:
        raise ConfigError(f"The master copy of a kernel is fp32, not {extra.dtype}.")
