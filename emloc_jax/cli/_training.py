"""Training as a stage of a run: the step of a model in memory, and the loop with its bar."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from emloc_jax._program_memory import analysed
from emloc_jax.adapters import attach
from emloc_jax.cli._console import tick
from emloc_jax.cli._options import LoraOptions, TrainOptions
from emloc_jax.cli._session import Session
from emloc_jax.training import (
    TrainResult,
    TrainState,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    train,
)

__all__ = ["Step", "StepMaker", "Trained", "attach_for_training", "step_in_memory", "train_on"]

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step that is ready to run.

    Attributes:
      step: for `train`.
      frozen: what it takes besides the state and a batch.
      memory: bytes on the device at its peak, as compiled.
    """

    step: Any
    frozen: Any
    memory: int


# From the first state and batch (for their shapes), the optimizer and its schedule.
StepMaker = Callable[[TrainState, Batch, optax.GradientTransformation, optax.Schedule], Step]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
      trainables: adapters, or all parameters.
      result: of the loop.
      memory: bytes of the compiled step at its peak.
    """

    trainables: Any
    result: TrainResult
    memory: int


def step_in_memory(
    session: Session,
    frozen: Any,
    combine: Callable[[Any, Any, jax.Array | None], Any] | None,
    options: TrainOptions,
) -> StepMaker:
    """The step of training with all parameters in memory.

    Args:
      session: of the model.
      frozen: parameters that are not trained; None: all are.
      combine: from trainables and frozen parameters to those of the model.
      options: of the training.
    """
    extra = {} if combine is None else {"combine": combine}

    def make(state: TrainState, batch: Batch, tx: Any, schedule: Any) -> Step:
        step = make_train_step(
            session.loss,
            tx,
            accumulation=options.accumulation,
            clip=options.clip,
            schedule=schedule,
            **extra,
        )
        return Step(step, frozen, analysed(step.lower(state, frozen, batch)).peak)

    return make


def train_on(
    make_step: StepMaker,
    trainables: Any,
    batches: Any,
    options: TrainOptions,
    *,
    seed: int,
    folder: Path,
    resume: bool,
    config: dict[str, Any],
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    draws: int = 2,
    title: str = "Training",
) -> Trained:
    """Runs the training loop with a progress bar.

    Args:
      make_step: see `step_in_memory`, and `Original.lora_step`.
      trainables: adapters, or all parameters; consumed.
      batches: an iterable that starts anew every time.
      options: of the training.
      seed: of the run.
      folder: of checkpoints and metrics.
      resume: go on from the newest checkpoint.
      config: what must be equal when training is resumed.
      evaluate: from trainables to figures.
      draws: tells the random numbers of one stage from those of another.
      title: of the progress bar.
    """
    schedule = make_schedule(
        options.learning_rate, steps=options.steps, warmup=options.warmup, final=options.final
    )
    tx = make_optimizer(schedule, weight_decay=options.weight_decay)
    key = jax.random.fold_in(jax.random.key(seed), draws)
    state = init_state(trainables, tx, seed=key, copy=False)
    made = make_step(state, next(iter(batches)), tx, schedule)
    with tick(title, options.steps) as move:
        result = train(
            made.step,
            state,
            batches,
            steps=options.steps,
            frozen=made.frozen,
            folder=folder,
            resume=resume,
            config=config,
            save_every=options.save_every,
            evaluate=evaluate,
            evaluate_every=options.evaluate_every,
            skip_nonfinite=options.skip_nonfinite,
            callbacks=[lambda record: move(record["step"], _note(record))],
        )
    return Trained(result.state.trainables, result, made.memory)


def _note(record: Mapping[str, Any]) -> str:
    loss = record.get("loss", record.get("test_loss"))
    return "" if loss is None else f"loss {loss:.4f}"


def attach_for_training(lora: LoraOptions) -> Callable[[Any, Any, jax.Array | None], Any]:
    """`combine` for adapters: attaches them to the frozen parameters; dropout needs a key."""

    def combine(adapters: Any, frozen: Any, key: jax.Array | None) -> Any:
        if key is None or lora.dropout == 0:
            return attach(frozen, adapters)
        return attach(frozen, adapters, dropout=lora.dropout, key=key)

    return combine
