"""LSP-Offload as a stage of a run."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from emloc_jax._bytes import parse_bytes
from emloc_jax.cli._console import say, tick
from emloc_jax.cli._data import Dataset, training_batches
from emloc_jax.cli._options import FinetuneConfig, LspOptions, TrainOptions
from emloc_jax.cli._session import Session
from emloc_jax.errors import ConfigError
from emloc_jax.kernels import flatten_leaves, intercept
from emloc_jax.models import BlockStack, block_stack
from emloc_jax.offload import (
    AdamOptions,
    DevicePutLink,
    FitOptions,
    PinnedHostLink,
    PipelinedTrainer,
    PipelineOptions,
    Timeline,
    default_rules,
    draw_timeline,
    match_treatments,
    summarize,
    write_trace,
)
from emloc_jax.training import (
    PipelinedStep,
    TrainResult,
    label_inputs,
    make_head_loss,
    make_label_head_loss,
    make_schedule,
    train,
)

_RECORDED = 20  # last steps that a profile is made of
_HEAD_RULE = ("(pooler|classifier)/.*", "device")  # of a classifier

__all__ = ["LspTrained", "lsp_facts", "open_trainer", "train_lsp"]


def pipeline_options(lsp: LspOptions, train_options: TrainOptions, seed: int) -> PipelineOptions:
    """The library's options.

    Raises:
      ConfigError: a value out of range.
    """
    if lsp.calibration_rows < 1:
        raise ConfigError(f"lsp.calibration_rows is {lsp.calibration_rows}; give at least 1.")
    size: int | float = lsp.subspace
    if size > 1:
        if size != int(size):
            raise ConfigError(
                f"lsp.subspace is {size}; it must be a fraction up to 1, or a whole number."
            )
        size = int(size)
    options = train_options
    return PipelineOptions(
        learning_rate=make_schedule(
            options.learning_rate, steps=options.steps, warmup=options.warmup, final=options.final
        ),
        adam=AdamOptions(weight_decay=options.weight_decay),
        clip=options.clip,
        accumulation=options.accumulation,
        train=None if lsp.train is None else list(lsp.train.items()),
        subspace=size,
        nnz=lsp.nnz,
        fit=FitOptions(steps=lsp.fit_steps, learning_rate=lsp.fit_rate, threshold=lsp.threshold),
        refit_every=lsp.refit_every,
        product=lsp.product,
        wire=lsp.wire,
        normalize=lsp.normalize,
        rounding=lsp.rounding,
        seed=seed,
        host_memory=None if lsp.host_memory is None else parse_bytes(lsp.host_memory),
    )


def open_trainer(session: Session, config: FinetuneConfig, rows: Dataset) -> PipelinedTrainer:
    """The trainer of a run; records a timeline if the options ask for a profile.

    Raises:
      ConfigError: a fresh head that is not trained, or a link that the device lacks.
      EmlocError: options that do not fit the model.
    """
    lsp, seed = config.lsp, config.seed
    batches = training_batches(rows, config.data, batch_size=config.train.batch_size, seed=seed)

    def fresh_rows(step: int) -> Any:
        """Other rows at each check, the same ones when a run is resumed."""
        drawn = training_batches(
            rows, config.data, batch_size=lsp.calibration_rows, seed=seed + 1 + step
        )
        return next(iter(drawn))

    stack = block_stack(session.base.model, wrap=intercept)
    options = pipeline_options(lsp, config.train, seed)
    inputs, head_loss = None, make_head_loss(session.apply, chunk=config.train.chunk)
    if session.task is not None:
        inputs, head_loss = label_inputs, make_label_head_loss(session.apply)
        if options.train is None:
            rules = [*default_rules(stack.name), _HEAD_RULE]
            options = dataclasses.replace(options, train=rules)
        _check_fresh_head(session, stack, options)
    return PipelinedTrainer(
        stack,
        session.base.params,
        head_loss,
        next(iter(batches)),
        schedule=lsp.schedule,
        options=options,
        inputs=inputs,
        calibration=fresh_rows,
        link=PinnedHostLink() if lsp.link == "pinned" else DevicePutLink(),
        timeline=Timeline() if lsp.profile else None,
    )


def _check_fresh_head(session: Session, stack: BlockStack, options: PipelineOptions) -> None:
    """Refuses rules that leave a head as it was drawn.

    Raises:
      ConfigError: such rules.
      UnmatchedRuleError: a rule matches nothing.
    """
    base = session.base
    block = jax.eval_shape(lambda tree: stack.block_params(tree, 0), base.params)
    paths = [f"{stack.name}/{path}" for path in flatten_leaves(block)]
    paths += flatten_leaves(stack.outer(base.params))
    treatments = match_treatments(options.train or [], paths)
    frozen = [path for path in base.fresh if treatments[path] == "frozen"]
    if frozen:
        raise ConfigError(
            f"{base.source} lacks {', '.join(frozen)}, made afresh, but lsp.train leaves it "
            f"untrained. Add '{_HEAD_RULE[0]}': {_HEAD_RULE[1]} to lsp.train."
        )


@dataclasses.dataclass(frozen=True)
class LspTrained:
    """What training gave."""

    params: Any
    result: TrainResult


def train_lsp(
    trainer: PipelinedTrainer,
    batches: Any,
    options: TrainOptions,
    *,
    folder: Path,
    resume: bool,
    config: dict[str, Any],
    evaluate: Callable[[Any], dict[str, float]] | None,
) -> LspTrained:
    """Runs the training loop with a progress bar, and writes the timeline if one is recorded."""
    step = PipelinedStep(trainer)

    def forget(record: Any) -> None:
        if trainer.timeline is not None:
            trainer.timeline.forget(record["step"] - _RECORDED)

    with trainer, tick("Training", options.steps) as move:
        result = train(
            step,
            step.initial(),
            batches,
            steps=options.steps,
            folder=folder,
            resume=resume,
            config=config,
            save_every=options.save_every,
            evaluate=None if evaluate is None else lambda _: evaluate(trainer.params()),
            evaluate_every=options.evaluate_every,
            skip_nonfinite=options.skip_nonfinite,
            callbacks=[lambda record: move(record["step"], _note(record)), forget],
            snapshot=step.snapshot,
        )
        params = trainer.params()
    if trainer.timeline is not None and trainer.timeline.spans:
        _write_timeline(trainer, folder)
    return LspTrained(params, result)


def _write_timeline(trainer: PipelinedTrainer, folder: Path) -> None:
    assert trainer.timeline is not None
    write_trace(trainer.timeline, folder / "timeline.json", overwrite=True)
    if importlib.util.find_spec("matplotlib") is None:
        say("No picture of the lanes: install matplotlib (pip install 'emloc_jax[plots]').")
        return
    shown = sorted({span.step for span in trainer.timeline.spans})[-2:]
    draw_timeline(trainer.timeline, folder / "timeline.png", steps=shown, overwrite=True)


def lsp_facts(trainer: PipelinedTrainer) -> dict[str, Any]:
    """Figures of the closing table."""
    facts: dict[str, Any] = {"schedule": trainer.schedule.name}
    facts["checks of the projectors"] = len(trainer.refits)
    for report in trainer.refits:
        if report.step == 0:
            facts["estimation error, unfitted"] = report.mean_before
            facts["estimation error, fitted"] = report.mean_after
        else:  # these pairs were fitted on other rows
            facts["estimation error on fresh rows"] = report.mean_before
    if trainer.timeline is not None and trainer.timeline.spans:
        mean = summarize(trainer.timeline).mean
        facts["iteration_seconds"] = mean.seconds
        facts["overlap"] = mean.overlap
        facts["to host per step_bytes"] = mean.bytes_to_host
        facts["to device per step_bytes"] = mean.bytes_to_device
    return facts


def _note(record: Any) -> str:
    loss = record.get("loss", record.get("test_loss"))
    return "" if loss is None else f"loss {loss:.4f}"
