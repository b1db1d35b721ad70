"""The loss of a model that is read a block at a time, with and without adapters."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from emloc_jax.adapters import Adapter, attach
from emloc_jax.models import BlockSource
from emloc_jax.streaming._layer_adapters import block_adapters
from emloc_jax.streaming._model import streamed_model
from emloc_jax.streaming._spill import Spill
from emloc_jax.streaming._walk import walk
from emloc_jax.training import LossReport, mean_loss

__all__ = ["stream_loss", "stream_losses"]

T = TypeVar("T")


def stream_losses(
    model: Any,
    source: BlockSource,
    batches: Sequence[Mapping[str, Any]],
    variants: Mapping[T, Mapping[str, Adapter]],
    *,
    chunk: int = 256,
    activations: int | None = None,
    folder: Path | None = None,
    on_block: Callable[[int], None] | None = None,
) -> dict[T, np.ndarray]:
    """The loss sums of one model under several sets of adapters, in one walk over its blocks.

    Each block is read once, and all batches of all variants run through it. The sums are those of
    `make_loss` on the whole model, bit for bit where the layers are scanned.

    Args:
      model: the linen module.
      source: of its parameters, the original's or an emulator's.
      batches: with `tokens`, `targets`, `weights`, and `positions` and `segments` if they have any.
      variants: sets of adapters; an empty one for none.
      chunk: tokens whose logits live at once.
      activations: bytes of activations that may lie in host memory; None: no limit.
      folder: for the rest of them; None: where temporary files go.
      on_block: called with the number of blocks done.

    Returns:
      Per variant, `(loss sum, weight sum)` over all batches in float64.
    """
    parts = streamed_model(model, chunk=chunk)
    keys, numbers = list(variants), range(len(batches))
    outer = source.outer()
    outside = {
        key: {p: a for p, a in own.items() if not p.startswith("layers/")}
        for key, own in variants.items()
    }
    with tempfile.TemporaryDirectory(prefix="emloc-", dir=folder) as home:
        spill = Spill(Path(home), activations)
        outer = jax.device_put(outer)
        for place, key in enumerate(keys):
            for number in numbers:
                x = parts.embed(attach(outer, outside[key]), batches[number])
                spill.put((f"x{place}", 0, number), x)
        del outer
        for index, params in walk(source, range(source.num_blocks)):
            for place, key in enumerate(keys):
                own = attach(params, block_adapters(variants[key], index))
                for number in numbers:
                    at = (f"x{place}", index, number)
                    y = parts.block(own, spill.get(at), parts.context(batches[number]))
                    spill.drop(at)
                    spill.put((f"x{place}", index + 1, number), y)
            if on_block is not None:
                on_block(index + 1)
        outer = jax.device_put(source.outer())
        totals = {key: np.zeros(2) for key in keys}
        for place, key in enumerate(keys):
            own = attach(outer, outside[key])
            for number in numbers:
                at = (f"x{place}", source.num_blocks, number)
                pair = parts.head_loss(own, spill.get(at), batches[number])
                spill.drop(at)
                totals[key] += np.asarray([float(value) for value in jax.device_get(pair)])
    return totals


def stream_loss(
    model: Any,
    source: BlockSource,
    batches: Sequence[Mapping[str, Any]],
    *,
    adapters: Mapping[str, Adapter] | None = None,
    **options: Any,
) -> LossReport:
    """The mean loss over all learnt tokens, as `evaluate_loss` gives it; see `stream_losses`.

    Args:
      model, source, batches: see `stream_losses`.
      adapters: attached, if there are any.
      **options: see `stream_losses`.

    Raises:
      NoTokensError: no learnt token in any batch.
      NonFiniteError: a loss that is not finite.
    """
    variants = {"only": {} if adapters is None else adapters}
    total, weight = stream_losses(model, source, batches, variants, **options)["only"]
    return mean_loss(float(total), float(weight))
