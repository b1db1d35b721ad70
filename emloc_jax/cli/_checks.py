"""What is refused before any long work starts, and what the options select."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence

import jax
import numpy as np

from emloc_jax._bytes import parse_bytes
from emloc_jax.checkpoints import head_parameters, head_tensors
from emloc_jax.cli._adapters import new_adapters
from emloc_jax.cli._console import say
from emloc_jax.cli._data import Dataset, evaluation_batches, prompt_reader, training_batches
from emloc_jax.cli._options import (
    CorrectionOptions,
    EmulatorOptions,
    FinetuneConfig,
    LoraOptions,
    ScoreOptions,
    TrainOptions,
)
from emloc_jax.cli._session import Session
from emloc_jax.cli._task import Task
from emloc_jax.emulator import rank_for_energy, rank_for_ratio
from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.kernels import match_rules, select
from emloc_jax.models import InternVLConfig
from emloc_jax.training import make_optimizer, make_schedule, make_train_step, score_named

__all__ = [
    "check_correction",
    "check_data",
    "check_emulation",
    "check_emulator_options",
    "check_model",
    "check_moments",
    "check_scores",
    "check_training",
    "check_weights",
    "compressed_paths",
    "parse_limit",
]


def check_model(session: Session, method: str) -> None:
    """Refuses methods that cannot train a model of text and images.

    Raises:
      UnsupportedArchitectureError: LSP-Offload, which walks blocks of text.
    """
    if method == "lsp" and isinstance(session.base.config, InternVLConfig):
        raise UnsupportedArchitectureError(
            f"method=lsp was asked for, but {session.base.source} is an InternVL, whose image "
            "encoder lies outside the blocks that LSP-Offload walks. Use method=emloc or lora."
        )


def compressed_paths(session: Session, options: EmulatorOptions) -> list[str]:
    """Kernels that the options select for compression; tied heads and classifiers never are."""
    paths = [path for path, spec in session.kernels.items() if not spec.tied]
    head = head_tensors(session.base.config)
    return [path for path in select(options.where, paths) if path not in head]


def check_emulator_options(options: EmulatorOptions) -> None:
    """Refuses options that contradict each other.

    Raises:
      ConfigError: not exactly one of ratio, ratios, energy, budget; or no calibration rows.
    """
    given = [n for n in ("ratio", "ratios", "energy", "budget") if getattr(options, n) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"Give exactly one of emulator.ratio, ratios, energy, budget; found {given or 'none'}."
        )
    if options.calibration_rows < 1 or options.calibration_batch < 1:
        raise ConfigError("emulator.calibration_rows and calibration_batch must be at least 1.")


def check_moments(emulator: EmulatorOptions, correct: CorrectionOptions) -> None:
    """Refuses moments that cannot weigh the correction.

    Raises:
      ConfigError: compact moments, and a weighted correction.
    """
    if correct.weighted and emulator.moments == "compact":
        raise ConfigError(
            "correct.weighted=true needs second moments of inputs in full, but emulator.moments is "
            "compact. Use emulator.moments=auto or full, or correct.weighted=false."
        )


def check_emulation(session: Session, options: EmulatorOptions) -> None:
    """Refuses, before any long work, what `compress` would refuse after calibration.

    Raises:
      RatioError: a ratio or energy outside (0, 1).
      UnmatchedRuleError: an expression matches nothing.
      ConfigError: see `check_emulator_options`, or a malformed budget.
    """
    check_emulator_options(options)
    paths = compressed_paths(session, options)
    if not paths:
        raise ConfigError(
            f"emulator.where={options.where} selects the classification head alone, which is never "
            "compressed. Select kernels of the layers."
        )
    head = head_tensors(session.base.config)
    _say_of_head(session, "emulator.where", options.where, head, "is never compressed")
    heads = [path for path in paths if path.startswith("lm_head")]
    if heads and options.weighting != "plain":
        raise ConfigError(
            f"emulator.where selects the head {heads[0]}, whose inputs are not calibrated here. "
            "Leave it out, or use emulator.weighting=plain."
        )
    skipped = select(options.skip, paths) if options.skip else []
    paths = [path for path in paths if path not in skipped]
    ratios = options.ratios if options.ratio is None else {".*": options.ratio}
    for ratio in match_rules(ratios or {}, paths).values():
        rank_for_ratio(1, 1, ratio)
    if options.energy is not None:
        rank_for_energy(np.ones(1), options.energy)
    if options.budget is not None:
        parse_bytes(options.budget)


def check_training(session: Session, train_options: TrainOptions, lora: LoraOptions | None) -> None:
    """Refuses impossible training options before any long work.

    Raises:
      ConfigError: steps, batch, rates or dropout that make no training.
      UnmatchedRuleError, RatioError: see `init_adapters`.
    """
    options = train_options
    if options.batch_size % max(options.accumulation, 1):
        raise ConfigError(
            f"train.batch_size is {options.batch_size} and train.accumulation "
            f"{options.accumulation}; the first must be a multiple of the second."
        )
    for name in ("steps", "save_every", "evaluate_every", "chunk", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"train.{name} is {value}; it must be at least 1.")
    schedule = make_schedule(
        options.learning_rate, steps=options.steps, warmup=options.warmup, final=options.final
    )
    tx = make_optimizer(schedule, weight_decay=options.weight_decay)
    make_train_step(
        session.loss, tx, accumulation=options.accumulation, clip=options.clip, schedule=schedule
    )
    if lora is not None:
        if not 0 <= lora.dropout < 1:
            raise ConfigError(f"lora.dropout is {lora.dropout}; it must be at least 0 and below 1.")
        base = session.base
        jax.eval_shape(
            lambda params: new_adapters(
                dataclasses.replace(session, base=dataclasses.replace(base, params=params)), lora, 0
            ),
            base.params,
        )
        _say_of_head(session, "lora.where", lora.where, head_parameters(base), "is trained whole")


def check_weights(session: Session, paths: Iterable[str]) -> None:
    """Refuses a weighted correction of kernels whose inputs are not calibrated.

    Args:
      session: of the original.
      paths: of the adapters.

    Raises:
      ConfigError: one lies in a head.
    """
    head = head_tensors(session.base.config)
    outside = [path for path in paths if path in head or path.startswith("lm_head")]
    if outside:
        raise ConfigError(
            f"correct.weighted=true needs the inputs of every kernel with an adapter, but those of "
            f"{', '.join(outside)} in the head are not calibrated. Leave it out of lora.where, or "
            "use correct.weighted=false."
        )


def check_correction(options: CorrectionOptions) -> None:
    """Refuses an impossible correction before any long work.

    Raises:
      ConfigError: `limit` is neither a number from 0 nor auto, or there are no rows.
    """
    if options.limit != "auto":
        parse_limit(options.limit)
    if options.rows is not None and options.rows < 1:
        raise ConfigError(f"correct.rows is {options.rows}; it must be at least 1, or null.")


def check_data(
    session: Session, config: FinetuneConfig, train: Dataset, test: Dataset | None
) -> None:
    """Refuses rows that batches or generation could not take, before any long work.

    Raises:
      ConfigError: an evaluation during training without test rows.
      DataError: a row longer than every bucket, or a prompt that leaves no room for an answer.
    """
    training_batches(train, config.data, batch_size=config.train.batch_size, seed=config.seed)
    if test is None:
        if config.train.evaluate_every is not None:
            raise ConfigError("train.evaluate_every needs test rows: give data.test.")
        return
    evaluation_batches(test, config.data, batch_size=config.eval.batch_size)
    if session.task is None and config.eval.of_answers():
        read = prompt_reader(session, config.data, config.eval.max_new_tokens)
        for row in test.rows:
            read(row)


def check_scores(options: ScoreOptions, task: Task | None = None) -> None:
    """Refuses an unknown score before any long work.

    Raises:
      ConfigError: a score that nobody registered (a classifier's are checked with its head), or
        an impossible size.
    """
    if task is None:
        for name in options.of_answers():
            score_named(name)
    for name in ("rows", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"eval.{name} is {value}; it must be at least 1.")


def parse_limit(text: str) -> float:
    """A limit from the command line.

    Raises:
      ConfigError: neither a number nor 'auto'.
    """
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ConfigError(
            f"correct.limit is '{text}'; it must be a number from 0 (no correction) to inf, "
            "or auto."
        )
    return limit


def _say_of_head(
    session: Session, option: str, where: Sequence[str], head: Collection[str], what: str
) -> None:
    """Says what becomes of a classification head that a rule selects."""
    found = [path for path in select(where, session.kernels) if path in head]
    if found:
        say(f"{option} selects {', '.join(found)} of the classification head, which {what}.")
