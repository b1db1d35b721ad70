"""`nn.Dense` and `nn.DenseGeneral`."""

import math
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._product import KernelUse

__all__ = ["contract", "first_argument", "use_dense", "use_dense_general"]


def use_dense(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelUse | str:
    """Handler of `nn.Dense`: contracts the last axis."""
    return _use(module, args, kwargs, axes=(-1,), num_out=1)


def use_dense_general(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> KernelUse | str:
    """Handler of `nn.DenseGeneral`: contracts `axis`, appends `features`."""
    if module.batch_dims:  # pyright: ignore
        return "DenseGeneral with `batch_dims` has one kernel per batch index."
    return _use(
        module,
        args,
        kwargs,
        axes=_as_tuple(module.axis),  # pyright: ignore
        num_out=len(_as_tuple(module.features)),  # pyright: ignore
    )


def _use(module: Any, args: Any, kwargs: Any, *, axes: tuple[int, ...], num_out: int) -> Any:
    if module.dot_general is not None or module.dot_general_cls is not None:
        return "the module computes with a `dot_general` of its own."
    x = first_argument(args, kwargs, "inputs")
    axes = tuple(axis % x.ndim for axis in axes)
    layout = Layout(num_in=len(axes), num_out=num_out)

    def full(x, kernel):
        x, kernel = module.promote_dtype(x, kernel, dtype=module.dtype)
        return contract(x, axes, kernel, module.precision)

    def low_rank(x, left, right):
        x, left, right = module.promote_dtype(x, left, right, dtype=module.dtype)
        narrow = contract(x, axes, left, module.precision)
        return contract(narrow, (narrow.ndim - 1,), right, module.precision)

    def finish(y):
        if not module.use_bias:
            return y
        bias = meta.unbox(module.get_variable("params", "bias"))
        y, bias = module.promote_dtype(y, bias, dtype=module.dtype)
        return y + bias

    def rows(x):
        tokens = tuple(i for i in range(x.ndim) if i not in axes)
        x = x.transpose(*tokens, *axes)
        return x.reshape(*x.shape[: len(tokens)], -1)

    def out_rows(y):
        shape = y.shape
        tokens = shape[: len(shape) - num_out]
        return y.reshape(*tokens, math.prod(shape[len(tokens) :])), lambda r: r.reshape(shape)

    return KernelUse(
        module=module,
        param="kernel",
        inputs=x,
        layout=layout,
        full=full,
        low_rank=low_rank,
        finish=finish,
        rows=rows,
        out_rows=out_rows,
        input_key=axes,
    )


def contract(x: jax.Array, axes: tuple[int, ...], array: jax.Array, precision: Any) -> jax.Array:
    """Contracts `axes` of `x` with the leading axes of `array`; the rest of `array` comes last."""
    leading = tuple(range(len(axes)))
    return jax.lax.dot_general(x, array, ((axes, leading), ((), ())), precision=precision)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The module's input, given by position or by keyword."""
    return args[0] if args else kwargs[name]


def _as_tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
