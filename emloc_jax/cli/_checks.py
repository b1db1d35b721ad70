"""What is refused before any long work starts, and what the options select."""

import math

import jax
import numpy as np

from emloc_jax.adapters import Adapter, init_adapters
from emloc_jax.cli._options import EmulatorOptions, LoraOptions, ScoreOptions, TrainOptions
from emloc_jax.cli._session import Session
from emloc_jax.cli._sizes import parse_bytes
from emloc_jax.emulator import rank_for_energy, rank_for_ratio
from emloc_jax.errors import ConfigError
from emloc_jax.kernels import match_rules, select
from emloc_jax.training import make_optimizer, make_schedule, make_train_step, score_named

__all__ = [
    "check_emulation",
    "check_emulator_options",
    "check_scores",
    "check_training",
    "compressed_paths",
    "new_adapters",
    "parse_limit",
]


def compressed_paths(session: Session, options: EmulatorOptions) -> list[str]:
    """Kernels that the options select for compression; tied heads never are."""
    paths = [path for path, spec in session.kernels.items() if not spec.tied]
    return select(options.where, paths)


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


def check_emulation(session: Session, options: EmulatorOptions) -> None:
    """Refuses, before any long work, what `compress` would refuse after calibration.

    Raises:
      RatioError: a ratio or energy outside (0, 1).
      UnmatchedRuleError: an expression matches nothing.
      ConfigError: see `check_emulator_options`, or a malformed budget.
    """
    check_emulator_options(options)
    paths = compressed_paths(session, options)
    if options.skip:
        select(options.skip, paths)
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
    if options.save_every < 1 or options.chunk < 1 or options.batch_size < 1:
        raise ConfigError("train.save_every, train.chunk and train.batch_size must be at least 1.")
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
        jax.eval_shape(lambda: new_adapters(session, lora, 0))


def check_scores(options: ScoreOptions) -> None:
    """Refuses an unknown score before any long work.

    Raises:
      ConfigError: a score that nobody registered, or an impossible size.
    """
    for name in options.scores:
        score_named(name)
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise ConfigError("eval.batch_size and eval.max_new_tokens must be at least 1.")


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


def new_adapters(session: Session, options: LoraOptions, seed: int) -> dict[str, Adapter]:
    """Untrained adapters on the selected kernels; a tied head gets none."""
    kernels = {path: spec for path, spec in session.kernels.items() if not spec.tied}
    return init_adapters(
        jax.random.fold_in(jax.random.key(seed), 1),
        kernels,
        where=options.where,
        rank=options.rank,
        alpha=options.alpha,
        rslora=options.rslora,
    )
