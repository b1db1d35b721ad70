"""The stages of a run as functions of a session: calibrate, emulate, correct, score."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emloc_jax._bytes import parse_bytes
from emloc_jax.adapters import Trainable, choose_limit, correct
from emloc_jax.checkpoints import calibration_fingerprint, save_emulator
from emloc_jax.cli._checks import compressed_paths, parse_limit
from emloc_jax.cli._console import tick, track
from emloc_jax.cli._data import Dataset, evaluation_batches, prompt_reader, token_mask
from emloc_jax.cli._options import (
    CorrectionOptions,
    DataOptions,
    EmulatorOptions,
    ScoreOptions,
)
from emloc_jax.cli._session import Session
from emloc_jax.emulator import (
    CompressionReport,
    MomentForm,
    SecondMoment,
    calibrate,
    compress,
)
from emloc_jax.streaming import stream_emulator
from emloc_jax.training import (
    GenerationReport,
    LabelReport,
    Row,
    evaluate_generation,
    evaluate_labels,
    evaluate_loss,
)

__all__ = [
    "Scores",
    "calibrate_session",
    "correct_session",
    "emulate",
    "evaluation_figures",
    "input_moments",
    "label_report",
    "score",
    "stream_emulate",
    "write_emulator",
]

Moments = dict[str, SecondMoment]
Batch = Mapping[str, np.ndarray]


def calibrate_session(
    session: Session, batches: Sequence[Batch], options: EmulatorOptions, *, full: bool = False
) -> Moments | None:
    """Second moments of the kernels to compress; None when plain SVD needs none.

    Args:
      session: the model.
      batches: what it runs on.
      options: what is measured, and in which form.
      full: the moments must be full whatever the options say, for a weighted correction.
    """
    form: MomentForm = "full" if full else options.moments
    paths = compressed_paths(session, options)
    match options.weighting:
        case "plain":
            return None
        case "one_sided":
            return input_moments(session, batches, paths, form=form)
    with tick("Calibrating", len(batches)) as move:
        return calibrate(
            lambda variables, batch: session.loss(variables["params"], batch)[0],
            session.base.params,
            batches,
            kernels={path: session.kernels[path] for path in paths},
            mask=token_mask,
            gradients=True,
            moments=form,
            on_batch=move,
        )


def input_moments(
    session: Session,
    batches: Sequence[Batch],
    paths: Sequence[str],
    *,
    form: MomentForm = "full",
) -> Moments:
    """Second moments of the inputs of some kernels of the layers, without gradients.

    Full by default, as the weighted correction needs them.
    """

    def hidden(variables: Any, batch: Any) -> jax.Array:
        return session.apply(variables, *session.inputs(batch), method="hidden")

    with tick("Calibrating", len(batches)) as move:
        return calibrate(
            hidden,
            session.base.params,
            batches,
            kernels={path: session.kernels[path] for path in paths},
            mask=token_mask,
            moments=form,
            on_batch=move,
        )


def emulate(
    session: Session, moments: Moments | None, options: EmulatorOptions
) -> tuple[Any, CompressionReport]:
    """The emulator's parameters, and what was done to each kernel."""
    kernels = {path: session.kernels[path] for path in compressed_paths(session, options)}
    budget = None if options.budget is None else parse_bytes(options.budget)
    done = iter(range(1, len(kernels) + 1))
    with tick("Factorizing", len(kernels)) as move:
        emulator, report = compress(
            session.base.params,
            moments,
            kernels=kernels,
            ratios=options.ratio if options.ratio is not None else options.ratios,
            energy=options.energy,
            budget=budget,
            skip=options.skip,
            weighting=options.weighting,
            on_kernel=lambda path: move(next(done), path),
        )
        jax.block_until_ready(emulator)
    return emulator, report


def stream_emulate(
    folder: Path,
    session: Session,
    batches: Sequence[Batch],
    options: EmulatorOptions,
    *,
    seed: int,
    activations: str,
    resume: bool,
) -> CompressionReport:
    """Calibrates, compresses and saves an emulator a block at a time; gives the report."""
    with tick("Calibrating and factorizing", 1) as move:
        return stream_emulator(
            folder,
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
            seed=seed,
            activations=parse_bytes(activations),
            resume=resume,
            on_step=lambda done, total: move(done, total=total),
        )


def write_emulator(
    folder: Path,
    session: Session,
    emulator: Any,
    report: CompressionReport,
    moments: Moments | None,
    options: EmulatorOptions,
    seed: int,
) -> None:
    """Saves an emulator with what it was made from and how."""
    save_emulator(
        folder,
        emulator,
        report,
        base=session.base,
        rules=dataclasses.asdict(options),
        weighting=options.weighting,
        calibration=None if moments is None else calibration_fingerprint(moments),
        seed=seed,
    )


def correct_session(
    session: Session,
    adapters: dict[str, Trainable],
    emulator: Any,
    options: CorrectionOptions,
    batches: Sequence[Batch],
    moments: Moments | None,
) -> tuple[dict[str, Trainable], float, dict[float, float]]:
    """Corrected adapters, the limit that was used, and the losses it was chosen by."""
    weights = moments if options.weighted else None
    losses: dict[float, float] = {}
    if options.limit == "auto":
        limit, losses = choose_limit(
            adapters,
            session.base.params,
            emulator,
            session.loss,
            track(batches, "Choosing the limit", total=len(batches)),
            moments=weights,
            bound=options.bound,
        )
    else:
        limit = parse_limit(options.limit)
    corrected = correct(
        adapters,
        session.base.params,
        emulator,
        limit=limit,
        moments=weights,
        bound=options.bound,
    )
    return corrected, limit, losses


@dataclasses.dataclass(frozen=True)
class Scores:
    """Loss and scores of one model on the test rows."""

    loss: float
    scores: dict[str, float]
    report: GenerationReport | None


def score(
    session: Session,
    params: Any,
    data: Dataset,
    options: ScoreOptions,
    data_options: DataOptions,
    name: str,
) -> Scores:
    """Evaluates `params` by loss, and by generated answers or a classifier's metrics."""
    batches = evaluation_batches(data, data_options, batch_size=options.batch_size)
    tracked = track(batches, f"Loss of {name}", total=len(batches))
    if session.task is not None:
        labels = label_report(session, params, tracked)
        return Scores(labels.loss, labels.scores, None)
    loss = evaluate_loss(session.loss, params, tracked).loss
    if not options.of_answers():
        return Scores(loss, {}, None)
    with tick(f"Answers of {name}", len(data.rows)) as move:
        report = evaluate_generation(
            lambda prompts: session.answer(
                params,
                prompts,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
            ),
            [row for row in data.rows if isinstance(row, Row)],
            scores=options.of_answers(),
            prompt=prompt_reader(session, data_options, options.max_new_tokens),
            batch_size=options.batch_size,
            on_batch=move,
        )
    return Scores(loss, report.scores, report)


def label_report(session: Session, params: Any, batches: Iterable[Any]) -> LabelReport:
    """Loss and metrics of a classifier."""
    task = session.task
    assert task is not None and session.logits is not None
    return evaluate_labels(
        session.logits, params, batches, metrics=task.metrics, positive=task.positive
    )


def evaluation_figures(session: Session, params: Any, batches: Iterable[Any]) -> dict[str, float]:
    """What an evaluation during training records: the loss on the test rows, and metrics."""
    if session.task is None:
        return {"test_loss": evaluate_loss(session.loss, params, batches).loss}
    report = label_report(session, params, batches)
    return {"test_loss": report.loss} | {f"test_{k}": v for k, v in report.scores.items()}
