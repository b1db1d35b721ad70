"""Adapters on a parameter tree, without arithmetic."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from emloc_jax.adapters._fit import fitting_leaves
from emloc_jax.adapters._keys import path_key, stacked_keys
from emloc_jax.adapters._whole import Trainable, split_whole
from emloc_jax.errors import AdapterMismatchError, ConfigError
from emloc_jax.kernels import LoraKernel, is_box, peel, set_leaves

__all__ = ["attach", "dropout_keys"]


def attach(
    params: Mapping[str, Any],
    adapters: Mapping[str, Trainable],
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Boxes every adapted kernel together with its adapter; nothing is computed or copied.

    `attach(emulator, adapters)` trains, `attach(params, adapters)` serves. Differentiate with
    respect to `adapters` through this call, and only they are trained. A `Whole` is put where its
    parameter was, in float32.

    Args:
      params: nested tree; the kernels may be arrays, boxes or `nn.Partitioned` of either.
      adapters: {path: Adapter or Whole}.
      dropout: rate of dropout on the adapters' input, in [0, 1); needs `key`.
      key: random key of this step. Every kernel, and every layer of a stacked one, folds its own.

    Returns:
      The tree with `LoraKernel` leaves at the adapters' paths, and the values trained whole.

    Raises:
      AdapterMismatchError: paths or shapes differ, or a kernel carries an adapter already.
      ConfigError: `dropout` outside [0, 1), or without `key`.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.adapters import Adapter
      >>> from emloc_jax.kernels import materialize
      >>> adapters = {"kernel": Adapter(jnp.ones((2, 1)), jnp.ones((1, 2)), alpha=3.0)}
      >>> materialize(attach({"kernel": jnp.eye(2)}, adapters))["kernel"].tolist()
      [[4.0, 3.0], [3.0, 4.0]]
    """
    if not 0 <= dropout < 1:
        raise ConfigError(f"`dropout` must lie in [0, 1); got {dropout!r}.")
    if dropout > 0 and key is None:
        raise ConfigError(
            f"`dropout={dropout}` draws random numbers: pass `key`, a new one per step."
        )
    bases = fitting_leaves(params, adapters)  # sharding metadata stays inside the new box
    for path, base in bases.items():
        if isinstance(peel(base), LoraKernel):
            raise AdapterMismatchError(
                f"Kernel '{path}' carries an adapter already. Attach to the tree without adapters, "
                "or merge the first adapters before."
            )
    keys = dropout_keys(key, adapters) if dropout > 0 and key is not None else {}
    lora, whole = split_whole(adapters)
    return set_leaves(
        params,
        {
            path: LoraKernel(
                base=bases[path],
                lora_a=adapter.lora_a,
                lora_b=adapter.lora_b,
                dropout_key=keys.get(path),
                alpha=adapter.alpha,
                rslora=adapter.rslora,
                dropout=dropout,
                layout=adapter.layout,
            )
            for path, adapter in lora.items()
        }
        | {path: _placed(bases[path], one.value) for path, one in whole.items()},
    )


def _placed(leaf: Any, value: jax.Array) -> Any:
    """A value in the stead of a leaf, with the sharding metadata of an array."""
    sharded = isinstance(leaf, meta.AxisMetadata) and not is_box(peel(leaf))
    return meta.replace_boxed(leaf, value) if sharded else value


def dropout_keys(key: jax.Array, adapters: Mapping[str, Trainable]) -> dict[str, jax.Array]:
    """The keys that `attach` gives to the kernels for dropout.

    Args:
      key: random key of this step.
      adapters: {path: Adapter or Whole}; what is trained whole has no branch to drop from.

    Returns:
      {path: key}, of shape `(*stack,)`: one key per layer of a stacked kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.adapters import Adapter
      >>> adapters = {"kernel": Adapter(jnp.ones((3, 2, 1)), jnp.ones((3, 1, 2)), alpha=3.0)}
      >>> dropout_keys(jax.random.key(0), adapters)["kernel"].shape
      (3,)
    """
    return {
        path: stacked_keys(path_key(key, path), adapter.stack_shape)
        for path, adapter in split_whole(adapters)[0].items()
    }
