"""A parameter that is trained whole, beside the adapters of other kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emloc_jax.adapters._adapter import Adapter
from emloc_jax.errors import AdapterMismatchError, UnsupportedKernelError
from emloc_jax.kernels import flatten_leaves, is_box, peel, select

__all__ = ["Trainable", "Whole", "init_whole", "lora_alone", "split_whole"]


@struct.dataclass
class Whole:
    """Takes the place of one parameter, where an `Adapter` adds to a kernel.

    For what a rank cannot bound because nothing was learnt there before: the head of a classifier,
    kernel and bias. It stands in one dictionary with the adapters, {path: Adapter or Whole}.
    Since emulator and original get the same value, there is nothing to correct.

    Attributes:
      value: of the parameter's shape, in the layout of its module; float32 whatever its dtype.

    Example:
      >>> from emloc_jax.adapters import attach
      >>> params = {"head": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
      >>> attach(params, {"head/bias": Whole(jnp.ones(2))})["head"]["bias"].tolist()
      [1.0, 1.0]
    """

    value: jax.Array


#: What is trained of one parameter.
Trainable = Adapter | Whole


def init_whole(params: Mapping[str, Any], *, where: str | Sequence[str]) -> dict[str, Whole]:
    """The present values of chosen parameters, to be trained whole; copies, in float32.

    Args:
      params: nested tree, whose leaves may be `nn.Partitioned`.
      where: regular expression(s) on whole paths of parameters, biases too.

    Returns:
      {path: Whole} in the order of the tree.

    Raises:
      UnmatchedRuleError: `where` matches no parameter.
      UnsupportedKernelError: a chosen parameter is boxed, or not of a float dtype.

    Example:
      >>> params = {"head": {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.zeros(2)}}
      >>> whole = init_whole(params, where="head/.*")
      >>> {path: (one.value.shape, str(one.value.dtype)) for path, one in whole.items()}
      {'head/bias': ((2,), 'float32'), 'head/kernel': ((3, 2), 'float32')}
    """
    leaves = flatten_leaves(params)
    return {path: _copied(path, peel(leaves[path])) for path in select(where, leaves)}


def _copied(path: str, leaf: Any) -> Whole:
    if is_box(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        found = f"a {type(leaf).__name__}" if is_box(leaf) else f"of dtype {leaf.dtype}"
        raise UnsupportedKernelError(
            f"'{path}' was to be trained whole, which takes an array of floats, but it is {found}. "
            "Start from the original parameters, or leave it out of `where`."
        )
    # A copy: training consumes its trainables, and the parameters must stay.
    return Whole(jnp.array(leaf, jnp.float32, copy=True))


def split_whole(
    adapters: Mapping[str, Trainable],
) -> tuple[dict[str, Adapter], dict[str, Whole]]:
    """The low-rank adapters, and the parameters that are trained whole.

    Example:
      >>> adapter = Adapter(jnp.ones((2, 1)), jnp.ones((1, 2)), alpha=1.0)
      >>> lora, whole = split_whole({"up/kernel": adapter, "head/bias": Whole(jnp.ones(2))})
      >>> list(lora), list(whole)
      (['up/kernel'], ['head/bias'])
    """
    lora = {path: one for path, one in adapters.items() if isinstance(one, Adapter)}
    return lora, {path: one for path, one in adapters.items() if isinstance(one, Whole)}


def lora_alone(adapters: Mapping[str, Trainable], what: str) -> dict[str, Adapter]:
    """The adapters, where nothing may be trained whole.

    Args:
      adapters: {path: Adapter}.
      what: asks for them, for the message.

    Raises:
      AdapterMismatchError: a parameter was trained whole.
    """
    lora, whole = split_whole(adapters)
    if whole:
        raise AdapterMismatchError(
            f"{what} takes low-rank adapters alone, but {len(whole)} parameter(s) were trained "
            f"whole, the first is '{next(iter(whole))}'. Merge them into the weights of a model in "
            "memory instead."
        )
    return lora
