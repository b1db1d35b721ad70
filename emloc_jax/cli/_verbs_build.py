"""The commands that make an emulator and that correct an adapter."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from emloc_jax._bytes import parse_bytes
from emloc_jax._files import check_new
from emloc_jax.adapters import correction_report
from emloc_jax.checkpoints import load_adapter, load_emulator, save_adapter
from emloc_jax.cli._checks import (
    check_correction,
    check_emulation,
    check_emulator_options,
    compressed_paths,
    parse_limit,
)
from emloc_jax.cli._console import results, say, tick
from emloc_jax.cli._data import calibration_batches, load_rows
from emloc_jax.cli._options import CorrectConfig, EmulateConfig
from emloc_jax.cli._run import write_json
from emloc_jax.cli._session import Session, open_session
from emloc_jax.cli._stages import (
    calibrate_session,
    correct_session,
    emulate,
    input_moments,
    write_emulator,
)
from emloc_jax.cli._stream import wants_stream
from emloc_jax.errors import ConfigError
from emloc_jax.streaming import StreamedCorrection, stream_emulator

__all__ = ["run_correct", "run_emulate", "stream_emulate"]


def run_emulate(config: EmulateConfig, *, resume: bool = False) -> None:
    """Calibrates and compresses; writes an emulator folder.

    Args:
      config: all options.
      resume: go on with a streamed build that was killed.
    """
    check_emulator_options(config.emulator)
    if not resume:
        check_new(config.output)
    streamed = wants_stream(config.stream, config.model)
    if resume and not streamed:
        raise ConfigError(
            "--resume goes on with an emulator that is built a block at a time. Give stream=true, "
            "or leave --resume out."
        )
    session = open_session(config.model, abstract=streamed)
    check_emulation(session, config.emulator)
    data = load_rows(session, config.data.train, config.data)
    calibration = calibration_batches(
        data,
        config.data,
        rows=config.emulator.calibration_rows,
        batch_size=config.emulator.calibration_batch,
        seed=config.seed,
    )
    output = Path(config.output)
    if streamed:
        report = stream_emulate(output, session, calibration, config, resume=resume)
    else:
        moments = calibrate_session(session, calibration, config.emulator)
        emulator, report = emulate(session, moments, config.emulator)
        write_emulator(output, session, emulator, report, moments, config.emulator, config.seed)
    results.print(report.table())
    say(f"The emulator is in {config.output}.")


def stream_emulate(
    output: Path, session: Session, batches: list[Any], config: EmulateConfig, *, resume: bool
) -> Any:
    """The same a block at a time; gives the report."""
    options = config.emulator
    with tick("Calibrating and factorizing", 1) as move:
        return stream_emulator(
            output,
            session.base,
            batches,
            kernels={path: session.kernels[path] for path in compressed_paths(session, options)},
            ratios=options.ratio if options.ratio is not None else options.ratios,
            energy=options.energy,
            budget=None if options.budget is None else parse_bytes(options.budget),
            skip=options.skip,
            weighting=options.weighting,
            moments=options.moments,
            rules=dataclasses.asdict(options),
            seed=config.seed,
            activations=parse_bytes(config.activations),
            resume=resume,
            on_step=lambda done, total: move(done, total=total),
        )


def run_correct(config: CorrectConfig) -> None:
    """Corrects an adapter; writes a new adapter folder and leaves the old one as it is."""
    check_correction(config.correct)
    check_new(config.output)
    check_new(f"{Path(config.output)}.correction.json")
    streamed = wants_stream(config.stream, config.model)
    session = open_session(config.model, abstract=streamed)
    adapters = load_adapter(config.adapter, session.base)
    choosing, weights = _calibration(session, config)
    options = config.correct
    if streamed:
        work = StreamedCorrection(
            adapters,
            session.base,
            config.emulator,
            bound=options.bound,
            weights=weights,
            kernels=session.kernels,
            activations=parse_bytes(config.activations),
        )
        losses: dict[float, float] = {}
        if options.limit == "auto":
            with tick("Choosing the limit", session.base.config.num_layers) as move:
                limit, losses = work.choose_limit(choosing, on_block=move)
        else:
            limit = parse_limit(options.limit)
        corrected, report = work.correct(limit)
    else:
        emulator = jax.device_put(load_emulator(config.emulator, session.base))
        moments = None if weights is None else input_moments(session, weights, list(adapters))
        corrected, limit, losses = correct_session(
            session, adapters, emulator, options, choosing, moments
        )
        report = correction_report(
            adapters,
            session.base.params,
            emulator,
            limit=limit,
            moments=moments,
            bound=options.bound,
        )
    save_adapter(config.output, corrected, base=session.base, limit=limit)
    content = report.to_dict() | {"calibration_loss": {str(k): v for k, v in losses.items()}}
    write_json(Path(f"{Path(config.output)}.correction.json"), content)
    results.print(report.table())
    for candidate, loss in losses.items():
        results.print(f"limit {candidate:g}: calibration loss {loss:.4f}")
    say(f"Corrected with limit {limit:g}; the new adapter is in {config.output}.")


def _calibration(session: Session, config: CorrectConfig) -> tuple[list[Any], list[Any] | None]:
    """Batches that choose the limit, and those that weigh the correction."""
    if config.correct.limit != "auto" and not config.correct.weighted:
        return [], None
    if config.data.train is None:
        raise ConfigError(
            "correct.limit=auto and correct.weighted=true need rows: give data.train."
        )
    data = load_rows(session, config.data.train, config.data)

    def calibration(rows: int) -> list[Any]:
        size = config.calibration.batch
        return calibration_batches(data, config.data, rows=rows, batch_size=size, seed=config.seed)

    rows = config.calibration.rows
    choosing = calibration(rows if config.correct.rows is None else config.correct.rows)
    return choosing, calibration(rows) if config.correct.weighted else None
