"""`nn.Einsum`."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from emloc_jax.kernels._handle_dense import first_argument
from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._product import KernelUse

__all__ = ["use_einsum"]

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def use_einsum(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelUse | str:
    """Handler of `nn.Einsum`: `BTD,DNH->BTNH` becomes `BTD,Dr->BTr` and `BTr,rNH->BTNH`."""
    m: Any = module
    x = first_argument(args, kwargs, "inputs")
    text = (args[1] if len(args) > 1 else kwargs.get("einsum_str")) or m.einsum_str
    x_axes, k_axes, y_axes = _parse(text.replace(" ", ""), x.ndim)

    ins = tuple(c for c in k_axes if c in x_axes and c not in y_axes)
    outs = tuple(c for c in y_axes if c in k_axes and c not in x_axes)
    tokens = "".join(c for c in x_axes if c not in ins)
    if set(k_axes) != set(ins) | set(outs) or len(set(k_axes)) != len(k_axes):
        return f"the einsum '{text}' has a kernel axis that is not purely input or output."
    if not set(tokens) <= set(y_axes):
        return f"the einsum '{text}' sums over an axis of the input that the kernel lacks."

    canonical = "".join(ins + outs)
    layout = Layout(len(ins), len(outs), tuple(k_axes.index(c) for c in canonical))
    r = next(c for c in _LETTERS if c not in x_axes + k_axes)
    reduce_text = f"{x_axes},{''.join(ins)}{r}->{tokens}{r}"
    expand_text = f"{tokens}{r},{r}{''.join(outs)}->{y_axes}"
    options = {
        "precision": m.precision,
        "preferred_element_type": m.preferred_element_type,
    }

    def full(x, kernel):
        x, kernel = m.promote_dtype(x, kernel, dtype=m.dtype)
        return jnp.einsum(f"{x_axes},{k_axes}->{y_axes}", x, kernel, **options)

    def low_rank(x, left, right):
        x, left, right = m.promote_dtype(x, left, right, dtype=m.dtype)
        return jnp.einsum(
            expand_text, jnp.einsum(reduce_text, x, left, **options), right, **options
        )

    def finish(y):
        if not m.use_bias:
            return y
        bias = meta.unbox(m.get_variable("params", "bias"))
        y, bias = m.promote_dtype(y, bias, dtype=m.dtype)
        sizes = [y.shape[i] if c in outs else 1 for i, c in enumerate(y_axes)]
        return y + bias.reshape(sizes)

    def rows(x):
        x = jnp.einsum(f"{x_axes}->{tokens}{''.join(ins)}", x)
        return x.reshape(*x.shape[: len(tokens)], -1)

    def out_rows(y):
        moved = jnp.einsum(f"{y_axes}->{tokens}{''.join(outs)}", y)
        shape = moved.shape
        flat = moved.reshape(*shape[: len(tokens)], math.prod(shape[len(tokens) :]))
        back = f"{tokens}{''.join(outs)}->{y_axes}"
        return flat, lambda r: jnp.einsum(back, r.reshape(shape))

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
        input_key=tuple(x_axes.index(c) for c in ins),
    )


def _parse(text: str, x_ndim: int) -> tuple[str, str, str]:
    """Splits an explicit two-operand einsum, spelling an ellipsis out in letters."""
    operands, y_axes = text.split("->")
    x_axes, k_axes = operands.split(",")
    if "..." in x_axes:
        unused = [c for c in _LETTERS if c not in text]
        extra = "".join(unused[: x_ndim - len(x_axes) + 3])
        x_axes, y_axes = x_axes.replace("...", extra), y_axes.replace("...", extra)
    return x_axes, k_axes, y_axes
