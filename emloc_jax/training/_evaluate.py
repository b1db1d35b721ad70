"""Evaluation by loss over rows, and by generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from emloc_jax._compiling import loop_options
from emloc_jax.errors import ConfigError, DataError, NonFiniteError, NoTokensError
from emloc_jax.training._chat import prompt_text
from emloc_jax.training._loss import Loss
from emloc_jax.training._rows import Row
from emloc_jax.training._scores import score_named

__all__ = [
    "Answer",
    "GenerationReport",
    "LossReport",
    "evaluate_generation",
    "evaluate_loss",
    "mean_loss",
]


@dataclass(frozen=True)
class LossReport:
    """Mean loss per learnt token, in nats, and the number (weight) of those tokens."""

    loss: float
    weight: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class Answer:
    """One generated answer with its scores."""

    origin: str
    prompt: Any
    reference: str
    prediction: str
    scores: dict[str, float]


@dataclass(frozen=True)
class GenerationReport:
    """Mean of each score, and every answer."""

    scores: dict[str, float]
    answers: list[Answer]


def evaluate_loss(
    loss: Loss,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> LossReport:
    """The mean loss over all learnt tokens of all batches (not the mean of batch means).

    Args:
        loss: `loss(params, batch) -> (sum, weight)`, as by `make_loss`; compiled once per batch
            shape, also over several calls with the same function.
        params: parameters, possibly boxed.
        batches: a finite stream (`epochs=1`).
        on_batch: called with the number of batches done, for a progress bar.

    Raises:
        NoTokensError: no learnt token in any batch.
        NonFiniteError: a loss that is not finite.

    Example:
        >>> batches = [{"x": np.ones(2)}, {"x": np.full(4, 4.0)}]
        >>> evaluate_loss(lambda p, b: (b["x"].sum(), b["x"].size), None, batches).loss
        3.0
    """
    compiled = jax.jit(loss, compiler_options=loop_options())
    total = weight = 0.0  # double precision
    for done, batch in enumerate(batches, 1):
        batch_total, batch_weight = jax.device_get(compiled(params, batch))
        total += float(batch_total)
        weight += float(batch_weight)
        if on_batch is not None:
            on_batch(done)
    return mean_loss(total, weight)


def mean_loss(total: float, weight: float) -> LossReport:
    """The report of a loss sum and a weight sum; refuses, as `evaluate_loss` does."""
    if weight == 0:
        raise NoTokensError("the loss was asked for, but the batches have no learnt token.")
    if not math.isfinite(total):
        raise NonFiniteError(f"the evaluated loss is {total / weight}; look at the parameters.")
    return LossReport(total / weight, weight)


def evaluate_generation(
    generate: Callable[[list[Any]], Sequence[str]],
    rows: Sequence[Row],
    *,
    scores: Sequence[str] = ("exact_match",),
    prompt: Callable[[Row], Any] = prompt_text,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> GenerationReport:
    """Scores of generated answers against the rows' own.

    Args:
        generate: from a list of prompts to their answers, prompts not repeated.
        rows: rows with references.
        scores: names of scores (see `score_named`).
        prompt: what `generate` gets for a row; for chats and token ids, `prompt_text` or
            `prompt_tokens` with their options bound.
        batch_size: prompts per call of `generate`.
        on_batch: called with the number of rows done, for a progress bar.

    Raises:
        ConfigError: an unknown score, or an impossible batch size.
        DataError: no rows, a reference that a score cannot read, or a number of answers that
            differs from that of prompts.

    Example:
        >>> rows = [Row("row 1", "1 + 1 =", " 2"), Row("row 2", "1 + 2 =", " 3")]
        >>> evaluate_generation(lambda prompts: ["2"] * len(prompts), rows).scores
        {'exact_match': 0.5}
    """
    functions = {name: score_named(name) for name in scores}
    if batch_size < 1 or not functions:
        raise ConfigError(
            f"batch_size is {batch_size} and scores {list(scores)}; both need at least one."
        )
    if not rows:
        raise DataError("generation was to be evaluated, but there are no rows.")
    answers: list[Answer] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts = [prompt(row) for row in part]
        texts = generate(prompts)
        if len(texts) != len(part):
            raise DataError(f"generate gave {len(texts)} answers to {len(part)} prompts.")
        for row, given, text in zip(part, prompts, texts, strict=True):
            marks = {name: _score(f, text, row) for name, f in functions.items()}
            answers.append(Answer(row.origin, given, row.reference, text, marks))
        if on_batch is not None:
            on_batch(len(answers))
    means = {
        name: math.fsum(answer.scores[name] for answer in answers) / len(answers)
        for name in functions
    }
    return GenerationReport(means, answers)


def _score(function: Callable[[str, str], float], text: str, row: Row) -> float:
    try:
        return float(function(text, row.reference))
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from error
