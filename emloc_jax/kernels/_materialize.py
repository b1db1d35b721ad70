"""From boxes back to arrays."""

from typing import Any

import jax

from emloc_jax.kernels._box import Box, is_box, is_leaf, peel

__all__ = ["materialize"]


def materialize(tree: Any) -> Any:
    """Replaces every boxed kernel in `tree` by the array it stands for; other leaves stay.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.kernels import LowRankKernel
      >>> materialize({"kernel": LowRankKernel(jnp.ones((2, 1)), jnp.ones((1, 2)))})
      {'kernel': Array([[1., 1.],
             [1., 1.]], dtype=float32)}
    """

    def one(leaf: Any) -> Any:
        if not is_box(peel(leaf)):
            return leaf
        value = peel(leaf)
        while isinstance(value, Box):
            value = peel(value.unbox())
        return value

    return jax.tree.map(one, tree, is_leaf=is_leaf)
