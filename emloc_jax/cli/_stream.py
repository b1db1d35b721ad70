"""The original walked a block at a time: streamed LoRA and its loss, as stages use them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from emloc_jax.adapters import Adapter
from emloc_jax.checkpoints import CheckpointBlocks
from emloc_jax.cli._options import FinetuneConfig, TrainOptions
from emloc_jax.cli._session import Session
from emloc_jax.errors import ConfigError
from emloc_jax.kernels import intercept
from emloc_jax.models import BlockSource, MemoryBlocks, block_stack
from emloc_jax.streaming import (
    LoraPrograms,
    StreamedLoraStep,
    streamed_lora_programs,
    streamed_loss,
)
from emloc_jax.training import make_head_loss

__all__ = ["StreamedOriginal", "check_stream"]


class StreamedOriginal:
    """The original's blocks, from the checkpoint's memory map or from where a session has them.

    Args:
      session: a language model; loaded abstract, its blocks are read from the checkpoint.
      chunk: tokens whose logits live at once.
      dropout: of the adapters while training.
    """

    def __init__(self, session: Session, *, chunk: int, dropout: float):
        base = session.base
        self._stack = block_stack(base.model, wrap=intercept)
        self._shapes, self._dropout = base.params, dropout
        on_disk = isinstance(jax.tree.leaves(base.params)[0], jax.ShapeDtypeStruct)
        self.source: BlockSource = (
            CheckpointBlocks(base) if on_disk else MemoryBlocks(self._stack, base.params)
        )
        self._head_loss = make_head_loss(session.apply, chunk=chunk)
        self._programs = LoraPrograms(self._stack, self._head_loss)
        self._step: StreamedLoraStep | None = None

    def step(
        self, tx: optax.GradientTransformation, schedule: optax.Schedule, options: TrainOptions
    ) -> StreamedLoraStep:
        """The step of a run; its `frozen` is `source`."""
        self._step = StreamedLoraStep(
            self._stack,
            self._head_loss,
            tx,
            accumulation=options.accumulation,
            clip=options.clip,
            schedule=schedule,
            dropout=self._dropout,
            inputs_in=options.block_inputs,
        )
        return self._step

    def memory(self, step: StreamedLoraStep, adapters: Any, batch: Mapping[str, Any]) -> int:
        """Bytes of the device that a step takes at most, from its compiled programs."""
        return streamed_lora_programs(step, self._shapes, adapters, batch).peak()

    def loss(
        self, adapters: Mapping[str, Adapter] | None, batches: Iterable[Mapping[str, Any]]
    ) -> float:
        """Mean loss per learnt token."""
        outer = None if self._step is None else self._step.outer(self.source)
        return streamed_loss(
            self._stack, self._programs, self.source, adapters, batches, outer=outer
        ).loss


def check_stream(config: FinetuneConfig, *, tests: bool) -> None:
    """Refuses what cannot be done with a model that is never whole in memory.

    Args:
      config: of the run.
      tests: there are test rows.

    Raises:
      ConfigError: another method than LoRA, or generated answers.
    """
    if not config.stream:
        return
    if config.method != "lora":
        raise ConfigError(
            f"stream=true was asked for with method={config.method}; it streams LoRA on the "
            "original (method=lora). The polish of method=emloc is streamed by polish.stream."
        )
    if tests and config.eval.of_answers():
        raise ConfigError(
            "stream=true evaluates by loss only, since generating an answer would read the whole "
            "model for every token. Set eval.scores=[], and score the adapter with emloc eval."
        )
