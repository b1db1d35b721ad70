"""Activation functions by the names that Hugging Face's config.json uses."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import Array

from emloc_jax.errors import UnsupportedArchitectureError

__all__ = ["activation"]

_exact = functools.partial(jax.nn.gelu, approximate=False)
# 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))); Hendrycks and Gimpel 2016, arXiv 1606.08415.
_tanh = functools.partial(jax.nn.gelu, approximate=True)

_BY_NAME: dict[str, Callable[[Array], Array]] = {
    "gelu": _exact,
    "gelu_python": _exact,
    "gelu_fast": _tanh,
    "gelu_new": _tanh,
    "gelu_python_tanh": _tanh,
    "gelu_pytorch_tanh": _tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function of that name.

    Args:
        name: as in ``hidden_act`` or ``activation_function``.

    Returns:
        An elementwise function.

    Raises:
        UnsupportedArchitectureError: it is not implemented.

    Example:
        >>> import jax.numpy as jnp
        >>> from emloc_jax.models.activations import activation
        >>> [round(float(activation(name)(jnp.float32(1))), 5) for name in ("gelu", "gelu_new")]
        [0.84134, 0.84119]
    """
    if name not in _BY_NAME:
        raise UnsupportedArchitectureError(
            f"The activation {name!r} was asked for; implemented are {', '.join(_BY_NAME)}. "
            "Use a model with one of these."
        )
    return _BY_NAME[name]
