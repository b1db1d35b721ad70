"""From factorizations and ranks to the parameters of an emulator."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from emloc_jax.emulator._factorization import Factorization
from emloc_jax.errors import RatioError
from emloc_jax.kernels import KernelSpec, LowRankKernel, get_leaf, set_leaves

__all__ = ["truncate"]


def truncate(
    params: Mapping[str, Any],
    factorizations: Mapping[str, Factorization],
    ranks: Mapping[str, int | None],
    *,
    kernels: Mapping[str, KernelSpec],
) -> dict[str, Any]:
    """Replaces kernels by `LowRankKernel` boxes of the given ranks; other leaves are shared.

    Factors have the dtype of the kernel. Where the kernel carries sharding names
    (`nn.Partitioned`), `left` gets the names of the input axes and `right` those of the output.

    Args:
      params: parameters of the original model.
      factorizations: from `factorize_kernels`.
      ranks: by path; None leaves the kernel whole.
      kernels: from `find_kernels`.

    Raises:
      RatioError: a rank is outside what its factorization holds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import find_kernels
      >>> model, x = nn.Dense(6), jnp.ones((1, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> kernels = find_kernels(model.apply, params, x)
      >>> from emloc_jax.emulator import factorize_kernels
      >>> full = factorize_kernels(params, None, kernels=kernels)
      >>> truncate(params, full, {"kernel": 2}, kernels=kernels)["kernel"].left.shape
      (8, 2)
    """
    boxes = {}
    for path, rank in ranks.items():
        if rank is None:
            continue
        full = factorizations[path]
        if not 1 <= rank <= full.max_rank:
            raise RatioError(
                f"Rank {rank} of '{path}' is outside 1..{full.max_rank}, which its factorization "
                "holds. Factor it again with a larger `max_ranks`, or ask for less."
            )
        boxes[path] = _box(get_leaf(params, path), *full.truncate(rank), kernels[path])
    return set_leaves(params, boxes)


def _box(leaf: Any, left: Any, right: Any, spec: KernelSpec) -> LowRankKernel:
    stack = spec.stack_shape
    left = left.reshape(*stack, *spec.in_shape, left.shape[-1]).astype(spec.dtype)
    right = right.reshape(*stack, right.shape[-2], *spec.out_shape).astype(spec.dtype)
    if isinstance(leaf, nn.Partitioned):
        left_names, right_names = _factor_names(tuple(leaf.names), spec)
        left = dataclasses.replace(leaf, value=left, names=left_names)
        right = dataclasses.replace(leaf, value=right, names=right_names)
    return LowRankKernel(left=left, right=right, layout=spec.layout)


def _factor_names(names: tuple[Any, ...], spec: KernelSpec) -> tuple[Any, Any]:
    """Sharding names of `left` and `right` from those of the stored kernel."""
    lead = len(spec.stack_shape)
    stack, own = names[:lead], names[lead:]
    if spec.layout.perm is not None:
        own = tuple(own[axis] for axis in spec.layout.perm)
    num_in = spec.layout.num_in
    return (*stack, *own[:num_in], None), (*stack, None, *own[num_in:])
