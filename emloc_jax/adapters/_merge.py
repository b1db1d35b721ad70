"""Adapters added into the kernels for good."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from emloc_jax.adapters._fit import fitting_leaves
from emloc_jax.adapters._stack import map_stack
from emloc_jax.adapters._whole import Trainable, Whole
from emloc_jax.errors import UnsupportedKernelError
from emloc_jax.kernels import is_box, peel, set_leaves

__all__ = ["merge", "merged_kernel"]


def merge(params: Mapping[str, Any], adapters: Mapping[str, Trainable]) -> dict[str, Any]:
    """Adds `scale * lora_a @ lora_b` to every adapted kernel, in float32.

    The sum is rounded once, to the kernel's dtype; what was trained whole takes its parameter's
    place, rounded likewise. The result is an ordinary tree for the unmodified model, in which
    untouched leaves are the same objects as in `params`.

    Args:
      params: nested tree whose adapted kernels are arrays (or `nn.Partitioned` arrays).
      adapters: {path: Adapter or Whole}.

    Returns:
      The tree with the adapted kernels replaced.

    Raises:
      AdapterMismatchError: paths or shapes differ.
      UnsupportedKernelError: an adapted kernel is boxed or not of a float dtype.

    Example:
      >>> from emloc_jax.adapters import Adapter
      >>> adapters = {"kernel": Adapter(jnp.ones((2, 1)), jnp.ones((1, 2)), alpha=3.0)}
      >>> merge({"kernel": jnp.eye(2), "bias": jnp.zeros(2)}, adapters)["kernel"].tolist()
      [[4.0, 3.0], [3.0, 4.0]]
    """
    leaves = fitting_leaves(params, adapters)
    for path, leaf in leaves.items():
        kernel = peel(leaf)
        if is_box(kernel) or not jnp.issubdtype(kernel.dtype, jnp.floating):
            found = f"a {type(kernel).__name__}" if is_box(kernel) else f"of dtype {kernel.dtype}"
            raise UnsupportedKernelError(
                f"An adapter merges into an array of floats, but kernel '{path}' is {found}. Merge "
                "into the original parameters, or call `materialize` on the tree first."
            )
    return set_leaves(params, {path: _merged(leaves[path], adapters[path]) for path in adapters})


def _merged(leaf: Any, adapter: Trainable) -> Any:
    kernel = peel(leaf)
    if isinstance(adapter, Whole):
        array = adapter.value.astype(kernel.dtype)
    else:
        matrix = merged_kernel(adapter.layout.matrix(kernel), *adapter.matrices(), adapter.scale)
        array = adapter.layout.from_matrix(matrix, adapter.in_shape, adapter.out_shape)
    return meta.replace_boxed(leaf, array) if isinstance(leaf, meta.AxisMetadata) else array


@jax.jit
def merged_kernel(
    kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array | float
) -> jax.Array:
    """Computes `kernel + scale * lora_a @ lora_b` in float32, rounded to the kernel's dtype.

    Args:
      kernel: (*stack, d_in, d_out).
      lora_a: (*stack, d_in, rank).
      lora_b: (*stack, rank, d_out).
      scale: scalar.

    Example:
      >>> merged_kernel(jnp.eye(2), jnp.ones((2, 1)), jnp.ones((1, 2)), 0.5).tolist()
      [[1.5, 0.5], [0.5, 1.5]]
    """

    def one(kernel, lora_a, lora_b):
        a, b = lora_a.astype(jnp.float32), lora_b.astype(jnp.float32)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    return map_stack(one, lora_a.shape[:-2], kernel, lora_a, lora_b)
