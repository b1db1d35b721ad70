"""Handlers: how each module type uses its kernel."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn

from emloc_jax.kernels._handle_conv import use_conv
from emloc_jax.kernels._handle_dense import use_dense, use_dense_general
from emloc_jax.kernels._handle_einsum import use_einsum
from emloc_jax.kernels._handle_embed import use_attend, use_lookup
from emloc_jax.kernels._product import KernelUse

__all__ = ["Handler", "handler_for", "kernel_names", "register_handler"]

# Returns how the call uses its kernel, or a sentence that says why this use is not supported.
Handler = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], KernelUse | str]

_HANDLERS: dict[tuple[type[nn.Module], str], Handler] = {
    (nn.Dense, "__call__"): use_dense,
    (nn.DenseGeneral, "__call__"): use_dense_general,
    (nn.Einsum, "__call__"): use_einsum,
    (nn.Conv, "__call__"): use_conv,
    (nn.Embed, "__call__"): use_lookup,
    (nn.Embed, "attend"): use_attend,
}
_KERNEL_NAMES: dict[type[nn.Module], str] = {
    nn.Dense: "kernel",
    nn.DenseGeneral: "kernel",
    nn.Einsum: "kernel",
    nn.Conv: "kernel",
    nn.Embed: "embedding",
}


def register_handler(
    module_type: type[nn.Module],
    handler: Handler,
    *,
    method: str = "__call__",
    param: str = "kernel",
) -> None:
    """Teaches interception a module type of yours.

    Only exact types match: a subclass may do more than its parent, so it needs an entry of its own.

    Args:
      module_type: linen module class whose `param` acts as a kernel in `method`.
      handler: `(module, args, kwargs)` to a `KernelUse`, or to a sentence why it is unsupported.
      method: name of the method to intercept.
      param: name of the kernel among the module's parameters.

    Example:
      >>> from flax import linen as nn
      >>> class MyDense(nn.Dense):  # behaves exactly like its parent
      ...   pass
      >>> from emloc_jax.kernels import use_dense
      >>> register_handler(MyDense, use_dense)
    """
    _HANDLERS[module_type, method] = handler
    _KERNEL_NAMES[module_type] = param


def handler_for(module_type: type[nn.Module], method: str) -> Handler | None:
    """The handler of a method of exactly this type, or None."""
    return _HANDLERS.get((module_type, method))


def kernel_names(module_type: type[nn.Module]) -> str | None:
    """Name of the kernel parameter of a handled type, or None."""
    return _KERNEL_NAMES.get(module_type)
