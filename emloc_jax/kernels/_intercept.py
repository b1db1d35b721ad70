"""The fast path: modules compute with the factors of a box instead of with its product."""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from emloc_jax.errors import UnsupportedKernelError
from emloc_jax.kernels._box import is_box, peel
from emloc_jax.kernels._handlers import handler_for, kernel_names
from emloc_jax.kernels._product import apply_kernel

__all__ = ["intercept"]


def intercept(apply: Callable[..., Any], *, allow_materialize: bool = False) -> Callable[..., Any]:
    """Wraps `model.apply` so that boxed kernels are applied factor by factor.

    The result equals that of the plain `apply`, which unboxes; only cost differs. The context is
    entered inside the returned function, so it is safe to jit, grad and vmap it.

    Args:
      apply: `apply(variables, *args, **kwargs)` of a linen module.
      allow_materialize: let a boxed kernel whose module has no handler be multiplied out at every
        call, instead of refusing.

    Returns:
      A function of the same signature.

    Raises:
      UnsupportedKernelError: on a call that meets a boxed kernel without a handler.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import LowRankKernel
      >>> model = nn.Dense(2, use_bias=False)
      >>> params = {"kernel": LowRankKernel(jnp.ones((3, 1)), jnp.ones((1, 2)))}
      >>> intercept(model.apply)({"params": params}, jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """
    interceptor = functools.partial(_run, allow_materialize=allow_materialize)

    @functools.wraps(apply)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(interceptor):
            return apply(*args, **kwargs)

    return intercepted


def _run(
    next_fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
    *,
    allow_materialize: bool,
) -> Any:
    module = context.module
    if module.scope is None or context.method_name == "setup":
        return next_fn(*args, **kwargs)
    reason = "no handler is registered for this module type."
    name = kernel_names(type(module))
    handler = handler_for(type(module), context.method_name)
    if handler is not None and name is not None:
        box = module.get_variable("params", name)
        if not _is_fast(box):
            return next_fn(*args, **kwargs)
        use = handler(module, args, kwargs)
        if not isinstance(use, str):
            return apply_kernel(use, box)
        reason = use
    if not allow_materialize:
        _refuse_boxes(module, reason)
    return next_fn(*args, **kwargs)


def _refuse_boxes(module: nn.Module, reason: str) -> None:
    """Refuses when the module itself (not a child) holds a boxed kernel."""
    assert module.scope is not None
    own = module.scope.variables().get("params", {})
    for name, value in own.items():
        if _is_fast(value):
            path = "/".join((*module.path, name))
            raise UnsupportedKernelError(
                f"Kernel '{path}' of {type(module).__name__} is boxed, but {reason} Register one "
                "with `register_handler`, leave this kernel out, or pass `allow_materialize=True` "
                "to multiply the factors out at every call."
            )


def _is_fast(value: Any) -> bool:
    value = peel(value)
    return is_box(value) and value.fast
