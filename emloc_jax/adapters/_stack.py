"""One matrix at a time over the leading axes of stacked kernels (arrays only)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["each_matrix", "map_stack"]


def map_stack(function: Callable[..., Any], stack_shape: tuple[int, ...], *trees: Any) -> Any:
    """Applies `function` to every matrix of the stack, in the memory of one.

    A loop rather than `vmap`: the float32 copy of a low-precision kernel exists for one layer at
    a time, which is what keeps correction and merge small on scanned models.

    Args:
      function: takes the trees without their leading axes.
      stack_shape: leading axes of every leaf; empty means `function(*trees)`.
      *trees: pytrees of arrays (*stack, ...); None subtrees pass through.

    Returns:
      The tree that `function` returns, with the leading axes put back.

    Example:
      >>> import jax.numpy as jnp
      >>> map_stack(lambda x: x @ x.T, (2, 3), jnp.ones((2, 3, 4, 5))).shape
      (2, 3, 4, 4)
    """
    if not stack_shape:
        return function(*trees)
    axes = len(stack_shape)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[axes:]), trees)
    results = jax.lax.map(lambda arguments: function(*arguments), flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*stack_shape, *leaf.shape[1:]), results)


def each_matrix(function: Callable[..., Any], stack_shape: tuple[int, ...], *trees: Any) -> Any:
    """Calls a compiled `function` on every matrix of the stack, one after the other.

    As `map_stack`, but with one program for a matrix, whether it stands alone or in a stack, so
    that a model whose layers come one by one from a disk gets the very numbers it gets whole.

    Args:
      function: a jitted function; takes the trees without their leading axes.
      stack_shape: leading axes of every leaf; empty means `function(*trees)`.
      *trees: pytrees of arrays (*stack, ...); None subtrees pass through.

    Returns:
      The tree that `function` returns, with the leading axes put back.

    Example:
      >>> each_matrix(jax.jit(lambda x: x @ x.T), (2, 3), jnp.ones((2, 3, 4, 5))).shape
      (2, 3, 4, 4)
    """
    if not stack_shape:
        return function(*trees)
    results = [
        function(*jax.tree.map(lambda leaf, layer=layer: leaf[layer], trees))
        for layer in np.ndindex(stack_shape)
    ]

    def stacked(*leaves: Any) -> Any:
        return jnp.stack(leaves).reshape(*stack_shape, *leaves[0].shape)

    return jax.tree.map(stacked, *results)
