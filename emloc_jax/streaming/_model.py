"""A causal language model cut into compiled programs: embedding, one block, head."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from emloc_jax.errors import UnsupportedArchitectureError
from emloc_jax.kernels import intercept
from emloc_jax.models import BlockStack, CausalModel, InternVL, block_stack
from emloc_jax.training import make_head_loss

__all__ = ["StreamedModel", "streamed_model"]


@dataclasses.dataclass(frozen=True)
class StreamedModel:
    """The parts of a model, each compiled once for all blocks and batches of a shape.

    Attributes:
      stack: what they are parts of; boxed kernels take their fast path.
      embed: `(outer, batch) -> x`.
      context: `batch -> context`, what every block reads besides x.
      block: `(block_params, x, context) -> x`.
      head_loss: `(outer, x, batch) -> (loss sum, weight sum)`, from the last block's output.
      head_gradient: `(outer, x, batch) -> dx` of the loss sum.
    """

    stack: BlockStack
    embed: Callable[[Any, Any], Any]
    context: Callable[[Any], Any]
    block: Callable[[Any, Any, Any], Any]
    head_loss: Callable[[Any, Any, Any], Any]
    head_gradient: Callable[[Any, Any, Any], Any]


def streamed_model(model: Any, *, chunk: int = 256) -> StreamedModel:
    """The programs of a model.

    Args:
      model: a causal language model of this library; `scan_layers` and `remat` change nothing
        here, since there is no whole model.
      chunk: tokens whose logits live at once.

    Raises:
      UnsupportedArchitectureError: another kind of model.
    """
    if not isinstance(model, CausalModel) or isinstance(model, InternVL):
        raise UnsupportedArchitectureError(
            f"A {type(model).__name__} was to be run a block at a time; that works for language "
            "models of text only. Run it in memory (stream=false)."
        )

    def wrap(apply: Callable) -> Callable:
        return intercept(apply, allow_materialize=True)

    stack = block_stack(model, wrap=wrap)
    head_loss = make_head_loss(wrap(model.apply), chunk=chunk)

    def where(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {key: batch.get(key) for key in ("positions", "segments")}

    def head_gradient(outer: Any, x: Any, batch: Any) -> Any:
        return jax.grad(lambda x: head_loss(outer, x, batch)[0])(x)

    return StreamedModel(
        stack=stack,
        embed=jax.jit(lambda outer, batch: stack.embed(outer, batch["tokens"], **where(batch))[0]),
        context=jax.jit(lambda batch: model.context(batch["tokens"], **where(batch))),
        block=jax.jit(stack.block),
        head_loss=jax.jit(head_loss),
        head_gradient=jax.jit(head_gradient),
    )
