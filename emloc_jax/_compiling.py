"""How programs that loop over layers are compiled."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.core import Tracer

__all__ = ["LoopJit", "compiling_for", "loop_options"]

_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def loop_options() -> dict[str, str | bool] | None:
    """`compiler_options` of `jax.jit` for a program that scans over layers.

    XLA's CPU backend computes bf16 in fp32, the slice of a layer's weights included. It converts
    the whole stack for that and moves the conversion out of the loop, so that an fp32 copy of all
    layers is held beside the bf16 ones: three times their memory. Left inside the loop, the
    conversion is fused with the slice, and only one layer's copy exists. Other backends have bf16
    and are left as they are.

    Example:
      >>> with compiling_for("cuda"):
      ...     print(loop_options())
      None
    """
    if (_platform.get() or jax.default_backend()) != "cpu":
        return None
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Lets `loop_options` answer for another platform than the one at hand."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


class LoopJit:
    """`jax.jit` with `loop_options` that may also be called inside of another program.

    JAX refuses options of its own to a program within a program; there it is compiled as the outer
    one is. All else (`lower`, `trace`, ...) is that of the program by itself.

    Args:
      function: to compile.
      **options: of `jax.jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> double = LoopJit(lambda x: 2 * x)
      >>> int(double(jnp.int32(2))), int(jax.jit(lambda x: double(x) + 1)(jnp.int32(2)))
      (4, 5)
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._alone = jax.jit(function, compiler_options=loop_options(), **options)
        self._inside = jax.jit(function, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program, or becomes part of the one that is being traced."""
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((args, kwargs)))
        return (self._inside if traced else self._alone)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._alone, name)
