"""The loss of a model that is never whole on the device, with or without adapters."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from emloc_jax.adapters import Adapter
from emloc_jax.errors import ConfigError, NonFiniteError, NoTokensError
from emloc_jax.models import BlockSource, BlockStack
from emloc_jax.streaming._lora_layers import AdapterLayers
from emloc_jax.streaming._lora_programs import LoraPrograms
from emloc_jax.streaming._walk import walk
from emloc_jax.training import LossReport

__all__ = ["streamed_loss"]


def streamed_loss(
    stack: BlockStack,
    programs: LoraPrograms,
    source: BlockSource,
    adapters: Mapping[str, Adapter] | None,
    batches: Iterable[Mapping[str, Any]],
    *,
    together: int = 8,
    outer: Any = None,
    on_batch: Callable[[int], None] | None = None,
) -> LossReport:
    """The mean loss over all learnt tokens of all batches: `evaluate_loss`, walking the blocks.

    Args:
      stack: of an intercepted model.
      programs: compiled once for all calls.
      source: of the parameters.
      adapters: to attach; None: none.
      batches: a finite stream.
      together: batches that pass each block before the next comes; the device holds the activation
        of each.
      outer: the parameters outside the blocks, if they are on the device already.
      on_batch: called with the number of batches done, for a progress bar.

    Raises:
      ConfigError: `together` is not positive.
      NoTokensError: no learnt token in any batch.
      NonFiniteError: a loss that is not finite.
    """
    if together < 1:
        raise ConfigError(f"together is {together}; at least 1 batch passes at a time.")
    adapters = adapters or {}
    layers = AdapterLayers(adapters, stack.name, stack.num_blocks)
    outer = jax.device_put(source.outer()) if outer is None else outer
    total = weight = 0.0  # double precision, in the order of the batches
    stream, done = iter(batches), 0
    while group := list(itertools.islice(stream, together)):
        embedded = [programs.embed(outer, batch) for batch in group]
        xs, contexts = [x for x, _ in embedded], [context for _, context in embedded]
        del embedded
        for index, params in walk(source, range(stack.num_blocks)):
            own = layers.take(adapters, index)
            for number, context in enumerate(contexts):
                xs[number] = programs.forward(params, own, None, xs[number], context)
            jax.block_until_ready(xs)
            del params
        for x, batch in zip(xs, group, strict=True):
            batch_total, batch_weight = jax.device_get(programs.head_loss(outer, x, batch))
            total += float(batch_total)
            weight += float(batch_weight)
            done += 1
            if on_batch is not None:
                on_batch(done)
    if weight == 0:
        raise NoTokensError("the loss was asked for, but the batches have no learnt token.")
    if not math.isfinite(total):
        raise NonFiniteError(f"the evaluated loss is {total / weight}; look at the parameters.")
    return LossReport(total / weight, weight)
