"""How programs that loop over layers are compiled."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

__all__ = ["compiling_for", "loop_options"]

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
