"""Programs that several threads call, compiled by one thread at a time."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import Tracer

__all__ = ["AloneJit"]

# One for the process: XLA's CPU compiler has crashed when two threads were in it at once.
_COMPILING = threading.Lock()


class AloneJit:
    """`jax.jit` whose compilations never run beside those of another `AloneJit`.

    A call with arguments of shapes, dtypes, places or static values not seen before holds a lock
    that all programs share while it compiles and dispatches; any other call takes no lock. All
    else (`lower`, `trace`, ...) is that of `jax.jit`.

    Args:
      function: to compile.
      **options: of `jax.jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> double = AloneJit(lambda x: 2 * x)
      >>> int(double(jnp.int32(2)))
      4
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._program = jax.jit(function, **options)
        self._seen: set[Hashable] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        if any(isinstance(leaf, Tracer) for leaf in leaves):  # a part of another program
            return self._program(*args, **kwargs)
        signature = (structure, *map(_signature, leaves))
        if signature in self._seen:
            return self._program(*args, **kwargs)
        with _COMPILING:
            result = self._program(*args, **kwargs)
        self._seen.add(signature)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


def _signature(leaf: Any) -> Hashable:
    """What `jax.jit` compiles again for."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, leaf.sharding, leaf.committed
    if hasattr(leaf, "shape"):
        return leaf.shape, leaf.dtype
    return type(leaf), leaf if isinstance(leaf, Hashable) else None
