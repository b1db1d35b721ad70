"""What blocks of causal language models share: two branches, each behind a norm."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.cache import KeysValues

__all__ = ["PreNormBlock"]


class PreNormBlock(nn.Module, abc.ABC):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    A subclass declares the four parts in ``setup``, by the names of its family, and tells them.

    Attributes:
        config: the model's shape.
        dtype: of the computation and of the residual stream.
        param_dtype: of the parameters.
        attention_implementation: of ``jax.nn.dot_product_attention``.
    """

    config: Any
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    @nn.nowrap
    @abc.abstractmethod
    def parts(self) -> tuple[Callable[[Array], Array], Any, Callable[[Array], Array], Any]:
        """The norm before attention, attention, the norm before the MLP, the MLP."""

    def __call__(self, x: Array, context: Any) -> Array:
        """The block on whole sequences.

        Args:
            x: (B, T, D).
            context: of the model: what its attention reads besides x.

        Returns:
            (B, T, D).
        """
        norm, attention, mlp_norm, mlp = self.parts()
        x = x + attention(norm(x), context)
        return x + mlp(mlp_norm(x))

    def decode(
        self, x: Array, cache: KeysValues, layer: int | Array, slot: Array, context: Any
    ) -> tuple[Array, KeysValues]:
        """The block on new tokens; arguments and results are those of ``Attention.decode``."""
        norm, attention, mlp_norm, mlp = self.parts()
        mixed, cache = attention.decode(norm(x), cache, layer, slot, context)
        x = x + mixed
        return x + mlp(mlp_norm(x)), cache
