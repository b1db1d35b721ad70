"""The commands that make an emulator and that correct an adapter."""

from pathlib import Path
from typing import Any

import jax

from emloc_jax._files import check_new
from emloc_jax.adapters import split_whole
from emloc_jax.checkpoints import load_emulator, save_adapter
from emloc_jax.cli._adapters import head_in, open_adapter
from emloc_jax.cli._budget import check_budget, correct_setting, emulate_setting, keep_budget
from emloc_jax.cli._checks import (
    check_correction,
    check_emulation,
    check_emulator_options,
    check_weights,
)
from emloc_jax.cli._console import results, say
from emloc_jax.cli._data import calibration_batches, encode
from emloc_jax.cli._options import CorrectConfig, EmulateConfig, ScoreOptions
from emloc_jax.cli._original import open_original
from emloc_jax.cli._rows import Rows, read_source
from emloc_jax.cli._run import write_json
from emloc_jax.cli._session import Session, load_parameters, open_session
from emloc_jax.cli._stages import calibrate_session, emulate, stream_emulate, write_emulator
from emloc_jax.cli._stream import wants_stream
from emloc_jax.cli._task import task_of
from emloc_jax.errors import ConfigError

__all__ = ["run_correct", "run_emulate"]


def run_emulate(config: EmulateConfig, *, resume: bool = False) -> None:
    """Calibrates and compresses; writes an emulator folder.

    Args:
      config: all options.
      resume: go on with a streamed build that was killed.
    """
    check_emulator_options(config.emulator)
    if config.emulator.save_moments:
        raise ConfigError(
            "emulator.save_moments=true was asked for, but moments are kept by finetune alone, in "
            "its run folder, where --resume finds them. Leave it out."
        )
    if not resume:
        check_new(config.output)
    streamed = wants_stream(config.stream, config.model)
    if resume and not streamed:
        raise ConfigError(
            "--resume goes on with an emulator that is built a block at a time. Give stream=true, "
            "or leave --resume out."
        )
    rows = read_source(config.data.train, config.data)
    session = open_session(
        config.model,
        abstract=True,
        task=task_of(rows, config.data, ScoreOptions()),
        fresh_head=True,
        seed=config.seed,
    )
    check_budget(session, config.memory_budget)
    check_emulation(session, config.emulator)
    data = encode(session, rows, config.data)
    calibration = calibration_batches(
        data,
        config.data,
        rows=config.emulator.calibration_rows,
        batch_size=config.emulator.calibration_batch,
        seed=config.seed,
    )
    if config.memory_budget is not None:
        planned = emulate_setting(config, session, data, stream=streamed)
        keep_budget(session, config.memory_budget, *planned)
    if not streamed:
        session = load_parameters(session, config.model, seed=config.seed)
    output = Path(config.output)
    if streamed:
        report = stream_emulate(
            output,
            session,
            calibration,
            config.emulator,
            seed=config.seed,
            activations=config.activations,
            resume=resume,
        )
    else:
        moments = calibrate_session(session, calibration, config.emulator)
        emulator, report = emulate(session, moments, config.emulator)
        write_emulator(output, session, emulator, report, moments, config.emulator, config.seed)
    results.print(report.table())
    say(f"The emulator is in {config.output}.")


def run_correct(config: CorrectConfig) -> None:
    """Corrects an adapter; writes a new adapter folder and leaves the old one as it is."""
    check_correction(config.correct)
    check_new(config.output)
    check_new(f"{Path(config.output)}.correction.json")
    streamed = wants_stream(config.stream, config.model)
    rows = _rows(config)
    task = None if rows is None else task_of(rows, config.data, ScoreOptions())
    session = open_session(
        config.model,
        abstract=True,
        task=task,
        head=head_in(config.adapter),
        runs=rows is not None,
    )
    check_budget(session, config.memory_budget)
    adapters = open_adapter(config.adapter, session)
    if config.correct.weighted:
        check_weights(session, split_whole(adapters)[0])
    choosing, weights = _calibration(session, rows, config)
    if config.memory_budget is not None:
        shapes = load_emulator(config.emulator, session.base, abstract=True)
        batches = [*choosing, *(weights or [])]
        planned = correct_setting(config, session, adapters, shapes, batches, stream=streamed)
        keep_budget(session, config.memory_budget, *planned)
    emulator = None
    if not streamed:
        session = load_parameters(session, config.model)
        emulator = jax.device_put(load_emulator(config.emulator, session.base))
    done = open_original(session, activations=config.activations).correct(
        adapters, emulator, Path(config.emulator), config.correct, choosing, weights
    )
    save_adapter(config.output, done.adapters, base=session.base, limit=done.limit)
    losses = {str(k): v for k, v in done.losses.items()}
    content = done.report.to_dict() | {"calibration_loss": losses}
    write_json(Path(f"{Path(config.output)}.correction.json"), content)
    results.print(done.report.table())
    for candidate, loss in done.losses.items():
        results.print(f"limit {candidate:g}: calibration loss {loss:.4f}")
    say(f"Corrected with limit {done.limit:g}; the new adapter is in {config.output}.")


def _rows(config: CorrectConfig) -> Rows | None:
    """The rows that the correction needs, if it does."""
    if config.correct.limit != "auto" and not config.correct.weighted:
        return None
    if config.data.train is None:
        raise ConfigError(
            "correct.limit=auto and correct.weighted=true need rows: give data.train."
        )
    return read_source(config.data.train, config.data)


def _calibration(
    session: Session, rows: Rows | None, config: CorrectConfig
) -> tuple[list[Any], list[Any] | None]:
    """Batches that choose the limit, and those that weigh the correction."""
    if rows is None:
        return [], None
    data = encode(session, rows, config.data)

    def calibration(rows: int) -> list[Any]:
        size = config.calibration.batch
        return calibration_batches(data, config.data, rows=rows, batch_size=size, seed=config.seed)

    number = config.calibration.rows
    choosing = calibration(number if config.correct.rows is None else config.correct.rows)
    return choosing, calibration(number) if config.correct.weighted else None
