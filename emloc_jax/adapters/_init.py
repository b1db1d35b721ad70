"""Fresh adapters for chosen kernels."""

import logging
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from emloc_jax.adapters._adapter import Adapter
from emloc_jax.adapters._keys import path_key
from emloc_jax.errors import RatioError, UnsupportedKernelError
from emloc_jax.kernels import KernelSpec, select

__all__ = ["init_adapters"]

logger = logging.getLogger(__name__)


def init_adapters(
    key: jax.Array,
    kernels: Mapping[str, KernelSpec],
    *,
    where: str | Sequence[str],
    rank: int,
    alpha: float,
    rslora: bool = False,
    allow_materialize: bool = False,
) -> dict[str, Adapter]:
    """Adapters that change nothing yet: `lora_a ~ U(-1/√d_in, 1/√d_in)`, `lora_b = 0`, float32.

    This is PEFT's initialisation (Kaiming-uniform with a = √5). Every kernel draws from its own
    key, folded from its path, so the choice of other targets does not change it; the layers of a
    stacked kernel draw independently. For different ranks, merge the dictionaries of two calls.

    Args:
      key: random key.
      kernels: from `find_kernels`.
      where: regular expression(s) on whole paths, with or without `/kernel`.
      rank: columns of `lora_a`.
      alpha: numerator of the scale.
      rslora: scale `alpha / √rank` instead of `alpha / rank`.
      allow_materialize: also accept kernels that are materialized at every call because they have
        no fast path, and embeddings that are tied to the head.

    Returns:
      {path: Adapter} in the order of `kernels`.

    Raises:
      RatioError: `rank` outside 1..min(d_in, d_out) of a target, or `alpha` not positive.
      UnmatchedRuleError: `where` matches no kernel.
      UnsupportedKernelError: a target without fast path, or tied, unless allowed.

    Example:
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import find_kernels
      >>> model, x = nn.Dense(6), jnp.ones((1, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> kernels = find_kernels(model.apply, params, x)
      >>> adapters = init_adapters(jax.random.key(1), kernels, where=".*", rank=2, alpha=4)
      >>> {path: (a.lora_a.shape, a.lora_b.shape, a.scale) for path, a in adapters.items()}
      {'kernel': ((8, 2), (2, 6), 2.0)}
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise RatioError(f"`alpha` must be a positive number; got {alpha!r}.")
    chosen = set(select(where, kernels))
    targets = {path: spec for path, spec in kernels.items() if path in chosen}
    for spec in targets.values():
        _check_target(spec, rank, allow_materialize)
    logger.info("adapters of rank %d on %d of %d kernels", rank, len(targets), len(kernels))
    return {
        path: _fresh(path_key(key, path), spec, rank, float(alpha), rslora)
        for path, spec in targets.items()
    }


def _fresh(key: jax.Array, spec: KernelSpec, rank: int, alpha: float, rslora: bool) -> Adapter:
    bound = 1.0 / math.sqrt(spec.d_in)
    shape = (*spec.stack_shape, *spec.in_shape, rank)
    return Adapter(
        lora_a=jax.random.uniform(key, shape, jnp.float32, -bound, bound),
        lora_b=jnp.zeros((*spec.stack_shape, rank, *spec.out_shape), jnp.float32),
        alpha=alpha,
        rslora=rslora,
        layout=spec.layout,
    )


def _check_target(spec: KernelSpec, rank: int, allow_materialize: bool) -> None:
    largest = min(spec.d_in, spec.d_out)
    if not 1 <= rank <= largest:
        raise RatioError(
            f"`rank` must lie in 1..{largest} for kernel '{spec.path}' with d_in={spec.d_in} and "
            f"d_out={spec.d_out}; got {rank}. Choose a smaller rank or leave this kernel out."
        )
    if allow_materialize:
        return
    if spec.tied:
        raise UnsupportedKernelError(
            f"Kernel '{spec.path}' is an embedding that is tied to the head: an adapter on it "
            "would change the lookup as well and form the whole table at every call. Leave it "
            "out of `where`, or pass `allow_materialize=True`."
        )
    if spec.handler is None:
        raise UnsupportedKernelError(
            f"Kernel '{spec.path}' of a {spec.module_type} has no fast path ({spec.reason}): an "
            "adapter on it would form the whole kernel at every call. Leave it out of `where`, "
            "register a handler, or pass `allow_materialize=True`."
        )
