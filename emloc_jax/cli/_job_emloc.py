"""`finetune method=emloc`: emulator, adapters trained on it, correction, polish, merge."""

import time
from typing import Any

import jax

from emloc_jax.adapters import Trainable
from emloc_jax.checkpoints import load_emulator
from emloc_jax.cli._adapters import new_adapters
from emloc_jax.cli._checks import compressed_paths
from emloc_jax.cli._job import Job
from emloc_jax.cli._polish import ContinuedBatches, polish_training
from emloc_jax.cli._session import byte_size
from emloc_jax.cli._stages import (
    calibrate_session,
    emulate,
    input_moments,
    stream_emulate,
    write_emulator,
)
from emloc_jax.cli._training import attach_for_training, step_in_memory, train_on
from emloc_jax.emulator import load_moments, save_moments

__all__ = ["run_emloc"]


def run_emloc(job: Job) -> None:
    """Emulator, adapters trained on it, correction, perhaps a polish, merge."""
    config = job.config
    job.evaluate("zero-shot")
    calibration = job.calibration(config.emulator.calibration_rows)
    emulator, moments = make_emulator(job, calibration)
    adapters = train_adapters(job, emulator)
    job.evaluate("adapter on the emulator", adapters, emulator)
    job.evaluate("adapter on the original, uncorrected", adapters)
    job.save_adapter("adapter", adapters)
    corrected = correct_adapters(job, adapters, emulator, calibration, moments)
    del emulator, moments  # the polish needs their memory
    if config.polish.steps:
        corrected = polish_adapters(job, corrected)
    job.save_merged(corrected)


def make_emulator(job: Job, calibration: list[Any]) -> tuple[Any, Any]:
    """The emulator, from its folder if that stage was finished, and the moments if at hand."""
    config, session, facts = job.config, job.session, job.report.facts
    if job.original.streamed:
        return make_streamed_emulator(job, calibration), None
    finished, kept = job.run.has("emulator"), job.run / "moments.safetensors"
    moments = load_moments(kept) if kept.exists() else None
    if moments is None and (not finished or config.correct.weighted):
        began = time.perf_counter()
        with job.ledger.stage("calibration"):
            moments = calibrate_session(
                session, calibration, config.emulator, full=config.correct.weighted
            )
            if moments is None and config.correct.weighted:  # plain SVD, weighted correction
                paths = compressed_paths(session, config.emulator)
                moments = input_moments(session, calibration, paths)
        facts["calibration_seconds"] = time.perf_counter() - began
        if moments is not None and config.emulator.save_moments:
            save_moments(kept, moments)
    if finished:
        emulator = jax.device_put(load_emulator(job.run / "emulator", session.base))
    else:
        began = time.perf_counter()
        with job.ledger.stage("factorization"):
            emulator, report = emulate(session, moments, config.emulator)
            facts["factorization_seconds"] = time.perf_counter() - began
            folder, seed = job.run / "emulator", config.seed
            write_emulator(folder, session, emulator, report, moments, config.emulator, seed)
    note_sizes(job, emulator)
    # What only the factorization needed must not lie there while adapters train.
    return emulator, moments if config.correct.weighted else None


def make_streamed_emulator(job: Job, calibration: list[Any]) -> Any:
    """The emulator, made a block at a time unless its folder was finished before."""
    config, session = job.config, job.session
    folder = job.run / "emulator"
    if not job.run.has("emulator"):
        began = time.perf_counter()
        with job.ledger.stage("calibration and factorization"):
            stream_emulate(
                folder,
                session,
                calibration,
                config.emulator,
                seed=config.seed,
                activations=config.activations,
                resume=job.run.resumed,
            )
        job.report.facts["calibration and factorization_seconds"] = time.perf_counter() - began
    emulator = jax.device_put(load_emulator(folder, session.base))
    note_sizes(job, emulator)
    return emulator


def note_sizes(job: Job, emulator: Any) -> None:
    """Notes the sizes of the original and of an emulator."""
    job.report.facts["original_bytes"] = byte_size(job.session.base.params)
    job.report.facts["emulator_bytes"] = byte_size(emulator)


def train_adapters(job: Job, emulator: Any) -> dict[str, Trainable]:
    """Adapters trained on the emulator."""
    config, combine = job.config, attach_for_training(job.config.lora)
    adapters = new_adapters(job.session, config.lora, config.seed)
    step = step_in_memory(job.session, emulator, combine, config.train)

    def figures(adapters: Any, batches: list[Any]) -> dict[str, float]:
        return job.test_figures(combine(adapters, emulator, None), batches)

    return job.train(step, adapters, figures).trainables


def correct_adapters(
    job: Job, adapters: dict[str, Trainable], emulator: Any, calibration: list[Any], moments: Any
) -> dict[str, Trainable]:
    """The adapters corrected for the original."""
    options, choosing = job.config.correct, calibration
    if options.rows is not None:
        choosing = job.calibration(options.rows)
    began = time.perf_counter()
    with job.ledger.stage("correction"):
        done = job.original.correct(
            adapters,
            emulator,
            job.run / "emulator",
            options,
            choosing,
            calibration if options.weighted else None,
            moments,
        )
        jax.block_until_ready(done.adapters)
    job.report.facts["correction_seconds"] = time.perf_counter() - began
    job.report.facts["correction limit"] = done.limit
    losses = {str(k): v for k, v in done.losses.items()}
    content = done.report.to_dict() | {"calibration_loss": losses}
    job.run.write_json("correction.json", content)
    job.evaluate("adapter on the original, corrected", done.adapters)
    job.save_adapter("adapter_corrected", done.adapters, limit=done.limit)
    return done.adapters


def polish_adapters(job: Job, adapters: dict[str, Trainable]) -> dict[str, Trainable]:
    """Corrected adapters after some steps on the original, on the batches that follow."""
    config, options = job.config, polish_training(job.config.polish, job.config.train)
    with job.ledger.stage("polish") as stage:
        trained = train_on(
            job.original.lora_step(options, config.lora),
            adapters,
            ContinuedBatches(job.training_batches(), config.train.steps),
            options,
            seed=config.seed,
            folder=job.run / "polish",
            resume=job.run.resumed,
            config=job.run_config(),
            draws=3,
            title="Polishing",
        )
        stage.predicted = trained.memory
    job.report.facts["polish step_bytes"] = trained.memory
    job.report.facts["polish step_seconds"] = trained.result.seconds_per_step
    job.evaluate("adapter on the original, polished", trained.trainables)
    job.save_adapter("adapter_polished", trained.trainables)
    return trained.trainables
