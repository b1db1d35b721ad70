"""Donation is promised by programs that update in place, and checked here."""

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax._program_memory import analysed
from emloc_jax.errors import PlanError

__all__ = ["assert_donated", "donated_bytes"]

_PER_BUFFER = 64  # XLA pads buffers, and counts a word for each array of a tuple


def donated_bytes(lowered: jax.stages.Lowered) -> int:
    """Bytes of the arguments that a program may overwrite.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
      >>> donated_bytes(jax.jit(lambda x, y: x + y, donate_argnums=0).lower(x, x))
      32
    """
    return sum(_size(leaf) for leaf in _donated(lowered))


def assert_donated(lowered: jax.stages.Lowered) -> None:
    """Checks that every donated byte is taken over by an output.

    Raises:
      PlanError: nothing is donated, or XLA aliases less (an output of another shape or dtype).

    Example:
      >>> import jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
      >>> assert_donated(jax.jit(lambda x: 2 * x, donate_argnums=0).lower(x))
    """
    promised, count = donated_bytes(lowered), len(_donated(lowered))
    aliased = analysed(lowered).aliased
    if promised == 0 or not 0 <= aliased - promised <= _PER_BUFFER * count:
        raise PlanError(
            f"{promised:,} bytes are donated in {count} arrays, but the compiled program reuses "
            f"{aliased:,}. An output must have the shape and dtype of each donated argument."
        )


def _donated(lowered: jax.stages.Lowered) -> list:
    return [leaf for leaf in jax.tree.leaves(lowered.args_info) if leaf.donated]


def _size(leaf: jax.stages.ArgInfo) -> int:
    shape = leaf.shape
    dtype = leaf.dtype
    width = 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * width
