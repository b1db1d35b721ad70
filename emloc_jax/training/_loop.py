"""The training loop: steps, metrics, evaluations, checkpoints, and exact resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax

from emloc_jax.errors import ConfigError, DataError, NonFiniteError, ResumeError
from emloc_jax.training._clock import StepClock
from emloc_jax.training._interrupt import HeldInterrupt
from emloc_jax.training._run_folder import RunFolder, UnsavedRun
from emloc_jax.training._state import TrainState
from emloc_jax.training._step import TrainStep

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with.

    Attributes:
        state: the state after the last step.
        records: all metrics records, those before a resumption included.
        resumed_from: step of the checkpoint the run went on from, or `None`.
        seconds_per_step: median, compilation excluded; `None` if every step compiled.
        tokens_per_second: real tokens, compilation excluded.
        compile_seconds: time of the first step of each batch shape.
    """

    state: TrainState
    records: list[dict[str, Any]]
    resumed_from: int | None
    seconds_per_step: float | None
    tokens_per_second: float | None
    compile_seconds: float


def train(
    step: TrainStep,
    state: TrainState,
    batches: Iterable[dict[str, Any]],
    *,
    steps: int,
    frozen: Any = None,
    folder: str | PathLike[str] | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    save_every: int | None = None,
    keep: int = 2,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    skip_nonfinite: bool = False,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    snapshot: Callable[[TrainState], TrainState] = lambda state: state,
) -> TrainResult:
    """Runs a training step up to step number `steps`.

    After each step a record goes to `metrics.jsonl` and to the callbacks: `step`, the step's
    metrics, and `seconds` and `tokens_per_second`, or `compile_seconds` where it compiled. An
    evaluation makes a record of its own. A run that is killed and resumed ends with the bits of
    one that was not. Ctrl-C takes effect at the end of a step, once that step is saved; a second
    one takes effect at once.

    Args:
        step: by `make_train_step`.
        state: by `init_state`; consumed.
        batches: an endless or long enough stream; to be saved, one whose iterator has `get_state`
            and `set_state` (`padded_batches`, `packed_batches`).
        steps: number of the last step.
        frozen: handed on to `step`.
        folder: run folder, which gets `checkpoints/` and `metrics.jsonl`; `None` saves nothing.
        resume: go on from the newest whole checkpoint in `folder`; if there is none, start afresh
            and say so in the log.
        config: anything JSON can hold that must be equal on resumption.
        save_every: steps between checkpoints; there is always one at the end.
        keep: checkpoints kept.
        evaluate: from trainables to numbers, at every `evaluate_every` steps and at the end. It
            must not keep the trainables, which the next step consumes.
        evaluate_every: steps between evaluations.
        skip_nonfinite: go on after a step whose loss or gradient is not finite (it changes nothing
            and is counted) instead of refusing it.
        callbacks: called with each record.
        snapshot: from the state that a step returns to the one that is saved, evaluated and
            returned; of a `PipelinedStep`.

    Raises:
        NonFiniteError: a loss or gradient that is not finite; the message names the step.
        DataError: the stream ends too early.
        OutputExistsError: `folder` holds a run and `resume` is not set.
        ResumeError: the saved run had another config, other data or another structure.
        CheckpointError: something could not be written.
        ConfigError: an impossible option.
        KeyboardInterrupt: Ctrl-C.

    Example:
        >>> import numpy as np
        >>> import optax
        >>> from emloc_jax.training import init_state, make_train_step
        >>> def loss(params, batch):
        ...     return ((params["w"] - batch["x"]) ** 2).sum(), np.float32(batch["x"].size)
        >>> tx = optax.sgd(0.25)
        >>> result = train(
        ...     make_train_step(loss, tx, clip=None),
        ...     init_state({"w": np.float32(0)}, tx),
        ...     [{"x": np.ones(2, np.float32)}] * 2,
        ...     steps=2,
        ... )
        >>> [record["loss"] for record in result.records], float(result.state.trainables["w"])
        ([1.0, 0.25], 0.75)
    """
    _require_positive(steps=steps, save_every=save_every, keep=keep, evaluate_every=evaluate_every)
    stream = iter(batches)
    if folder is None:
        if resume:
            raise ConfigError("resume was asked for, but no run folder was given.")
        run = UnsavedRun()
    elif not hasattr(stream, "get_state"):
        raise ConfigError(
            "the batches have no get_state, so a saved run could not be resumed; use "
            "padded_batches or packed_batches, or give no folder."
        )
    else:
        run = RunFolder(folder, resume=resume, config=config or {}, keep=keep)

    def emit(record: dict[str, Any]) -> None:
        run.append(record)
        for callback in callbacks:
            callback(record)

    def due(number: int, every: int | None) -> bool:
        return number == steps or (every is not None and number % every == 0)

    with run, HeldInterrupt() as interrupt:
        state, resumed_from = run.restore(state, stream)
        first = int(state.step)
        if first > steps:
            raise ResumeError(f"{folder}: the saved run is at step {first}, beyond {steps}.")
        clock = StepClock()
        batch = _fetch(stream, first + 1, steps)
        for number in range(first + 1, steps + 1):
            began = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            save = run.saves and (due(number, save_every) or interrupt.noted)
            position = stream.get_state() if save else None  # type: ignore[attr-defined]
            following = _fetch(stream, number + 1, steps)  # while the device computes
            metrics = {key: value.item() for key, value in jax.device_get(metrics).items()}
            seconds = time.perf_counter() - began
            if not metrics.pop("finite") and not skip_nonfinite:
                raise NonFiniteError(_nonfinite(number, metrics))
            emit({"step": number} | _finite(metrics) | clock.record(batch, seconds))
            if evaluate is not None and due(number, evaluate_every):
                emit({"step": number} | _finite(evaluate(snapshot(state).trainables)))
            if save:
                run.save(number, snapshot(state), position)
            if interrupt.noted and (save or not run.saves):
                break
            batch = following
        run.finish()
        if interrupt.noted:
            raise KeyboardInterrupt
    return TrainResult(
        state=snapshot(state),
        records=run.records,
        resumed_from=resumed_from,
        seconds_per_step=clock.seconds_per_step,
        tokens_per_second=clock.tokens_per_second,
        compile_seconds=clock.compile_seconds,
    )


def _fetch(stream: Iterator[Any], number: int, steps: int) -> Any:
    if number > steps:
        return None
    try:
        return next(stream)
    except StopIteration:
        raise DataError(
            f"the batches end before step {number} of {steps}; repeat them (epochs=None) or ask "
            "for fewer steps."
        ) from None


def _nonfinite(number: int, metrics: dict[str, float]) -> str:
    if metrics["weight"] == 0:
        return f"step {number}: no token of the batch is learnt, so it has no mean loss."
    return (
        f"step {number}: the loss is {metrics['loss']} and the gradient norm "
        f"{metrics['grad_norm']}; what is not finite was not applied. Lower the learning rate, "
        "look at the data, or skip such steps."
    )


def _finite(metrics: Mapping[str, float]) -> dict[str, Any]:
    """JSON has no NaN: what is not finite becomes null."""
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


def _require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
