"""The compiled programs of LoRA on a walked block stack: one of each per kind of block."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.adapters import Adapter, attach
from emloc_jax.errors import ConfigError
from emloc_jax.kernels import LoraKernel, flatten_leaves, set_leaves
from emloc_jax.models import BlockStack

__all__ = ["HeadLoss", "LoraPrograms", "token_inputs"]

# (outer parameters, x after the last block, batch) to loss sum and weight.
HeadLoss = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]


def token_inputs(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a causal language model embeds: tokens, positions and segments of a batch."""
    return batch["tokens"], batch.get("positions"), batch.get("segments")


class LoraPrograms:
    """Passes through embedding, block and head, each compiled once per shape.

    Gradients are taken with respect to adapters and activations only, and a block's forward pass
    is computed again in its backward pass.

    Args:
      stack: of an intercepted model (`block_stack(model, wrap=intercept)`).
      head_loss: as by `make_head_loss`.
      inputs: from a batch to the arguments of the stack's `embed`.
      dropout: rate of dropout on the adapters' input, in [0, 1).

    Attributes:
      embed: `(outer, batch) -> (x, context)`.
      forward: `(block params, adapters, keys, x, context) -> x`.
      backward: `(block params, adapters, keys, x, context, dy) -> (dx, gradients)`; consumes dy.
      head: `(outer, x, batch) -> (loss sum, weight, dx)`.

    Raises:
      ConfigError: a dropout outside [0, 1).
    """

    def __init__(
        self,
        stack: BlockStack,
        head_loss: HeadLoss,
        *,
        inputs: Callable[[Any], tuple[Any, ...]] = token_inputs,
        dropout: float = 0.0,
    ):
        if not 0 <= dropout < 1:
            raise ConfigError(f"`dropout` must lie in [0, 1); got {dropout!r}.")
        self._block, self._head_loss, self._dropout = stack.block, head_loss, dropout
        self.embed = jax.jit(lambda outer, batch: stack.embed(outer, *inputs(batch)))
        self.forward = jax.jit(self._forward)
        self.backward = jax.jit(self._backward, donate_argnames="dy")
        self.head = jax.jit(self._head)

    def _forward(
        self, params: Any, adapters: Mapping[str, Adapter], keys: Any, x: Any, context: Any
    ) -> Any:
        boxed = attach(params, adapters)
        if keys:
            leaves = flatten_leaves(boxed)
            boxed = set_leaves(
                boxed,
                {path: self._with_dropout(leaves[path], key) for path, key in keys.items()},
            )
        return self._block(boxed, x, context)

    def _with_dropout(self, box: LoraKernel, key: jax.Array) -> LoraKernel:
        return dataclasses.replace(box, dropout_key=key, dropout=self._dropout)

    def _backward(
        self, params: Any, adapters: Any, keys: Any, x: Any, context: Any, dy: Any
    ) -> tuple[Any, Any]:
        _, vjp = jax.vjp(lambda a, x: self._forward(params, a, keys, x, context), adapters, x)
        gradients, dx = vjp(dy)
        return dx, gradients

    def _head(self, outer: Any, x: Any, batch: Any) -> tuple[jax.Array, jax.Array, Any]:
        loss = jax.value_and_grad(lambda x: self._head_loss(outer, x, batch), has_aux=True)
        (total, weight), dx = loss(x)
        return total.astype(jnp.float32), weight.astype(jnp.float32), dx
