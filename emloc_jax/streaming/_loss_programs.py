"""What a streamed loss runs, lowered on shapes."""

from collections.abc import Mapping
from typing import Any

import jax

from emloc_jax._program import Program, tree_bytes
from emloc_jax.adapters import Adapter, attach
from emloc_jax.streaming._model import StreamedModel
from emloc_jax.streaming._shapes import BlockShapes

__all__ = ["loss_programs"]


def loss_programs(
    model: StreamedModel,
    shapes: BlockShapes,
    adapters: Mapping[str, Adapter],
    beside: Mapping[str, int],
) -> dict[str, Program]:
    """The programs of `stream_losses`, of one variant.

    Args:
      model: its parts.
      shapes: of the model and a batch.
      adapters: shapes of a block's own, by path inside it; empty for none.
      beside: bytes on the device all the time, by what they are.
    """
    x = shapes.x
    of_block = {"parameters": tree_bytes(shapes.block), "trainables": tree_bytes(adapters)}
    outside = {"outer parameters": tree_bytes(shapes.outer)}
    walked = {"next block": shapes.next_block, "activations": tree_bytes(x)}
    own = jax.eval_shape(lambda params, own: attach(params, own), shapes.block, dict(adapters))
    lowered: dict[str, Any] = {
        "embed": model.embed.lower(shapes.outer, shapes.batch),
        "block": model.block.lower(own, x, shapes.context),
        "loss": model.head_loss.lower(shapes.outer, x, shapes.batch),
    }
    return {
        "embed": Program(lowered["embed"], outside, beside=beside),
        "block": Program(
            lowered["block"],
            of_block,
            beside={**beside, **walked},
            host={"block as read": shapes.read},
        ),
        # The last block is dropped only when the function returns.
        "loss": Program(lowered["loss"], outside, beside={**beside, **of_block}),
    }
