"""A few steps of LoRA on the original after the correction."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from emloc_jax.cli._options import PolishOptions, TrainOptions
from emloc_jax.errors import ConfigError
from emloc_jax.training import make_schedule

__all__ = ["ContinuedBatches", "check_polish", "polish_training"]


class ContinuedBatches:
    """The batches that follow the first `skip` of another stream.

    Example:
      >>> list(ContinuedBatches("abcd", 2))
      ['c', 'd']
    """

    def __init__(self, batches: Iterable[Any], skip: int):
        self._batches, self._skip = batches, skip

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._batches)
        for _ in range(self._skip):
            next(iterator)
        return iterator


def polish_training(options: PolishOptions, training: TrainOptions) -> TrainOptions:
    """The options of training with those of the polish in their place."""
    return dataclasses.replace(
        training,
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        final=options.final,
        evaluate_every=None,
    )


def check_polish(options: PolishOptions, method: str) -> None:
    """Refuses an impossible polish before any long work.

    Raises:
      ConfigError: a negative number of steps, a schedule that is none, or a method without a
        correction to follow.
    """
    if options.steps and method != "emloc":
        raise ConfigError(
            f"polish.steps={options.steps} was asked for with method={method}; a polish follows "
            "the correction of method=emloc. Leave it out."
        )
    if options.steps < 0:
        raise ConfigError(f"polish.steps is {options.steps}; give 0 for none, or more.")
    if options.steps:
        try:
            make_schedule(
                options.learning_rate,
                steps=options.steps,
                warmup=options.warmup,
                final=options.final,
            )
        except ConfigError as error:
            raise ConfigError(f"polish: {error}") from error
