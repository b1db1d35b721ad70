"""Labelled rows as token arrays, and their batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training._labelled_rows import LabelledRow

__all__ = ["LabelledExample", "encode_labelled_rows", "label_names", "pad_labelled_examples"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LabelledExample:
    """One tokenised text or pair of texts, with what is to be predicted.

    Attributes:
        tokens: (n,) int32, the tokenizer's special tokens included.
        token_types: (n,) int32, which text a token is of; None for models without.
        label: () int32, the number of a class, or () float32, a number to predict.
        origin: where the row stands.
    """

    tokens: np.ndarray
    token_types: np.ndarray | None
    label: np.ndarray
    origin: str


def label_names(rows: Iterable[Any]) -> tuple[str, ...]:
    """The different labels of rows, sorted: as numbers if all of them are, else as text.

    Example:
        >>> label_names(LabelledRow(f"row {i}", "hi", None, label) for i, label in enumerate("bab"))
        ('a', 'b')
    """
    names = {str(row.label) for row in rows}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def encode_labelled_rows(
    rows: Sequence[LabelledRow],
    tokenizer: Any,
    *,
    names: Sequence[str],
    max_length: int,
    token_types: bool,
    truncate: Literal["left", "right"] | None = None,
) -> list[LabelledExample]:
    """Tokenise rows as the encoder was pretrained on them, pairs in one sequence.

    Args:
        rows: the rows.
        tokenizer: a Hugging Face tokenizer.
        names: of the classes, by number; empty if labels are numbers to predict.
        max_length: largest number of tokens, special ones included.
        token_types: whether the model tells the two texts apart by token types (BERT does,
            RoBERTa does not).
        truncate: what to do with a longer row: `None` refuses it, `'left'` and `'right'` cut that
            side of the longer text until both fit.

    Raises:
        DataError: a row that does not fit, or a label that is not among `names` (the message names
            it).
        ConfigError: an impossible option.
    """
    if max_length < 1 or truncate not in (None, "left", "right"):
        raise ConfigError(
            f"max_length is {max_length} and truncate {truncate!r}; max_length must be positive "
            "and truncate None, 'left' or 'right'."
        )
    numbers = {name: number for number, name in enumerate(names)}
    labels = [_label(row, numbers) for row in rows]
    pairs = [row.text_pair for row in rows]
    if None in pairs and any(pair is not None for pair in pairs):
        raise DataError("Some rows are pairs of texts and some are not; make them all alike.")
    options: dict[str, Any] = {"return_token_type_ids": token_types, "verbose": False}
    if truncate is not None:
        options |= {"truncation": True, "max_length": max_length}
    side = tokenizer.truncation_side
    tokenizer.truncation_side = truncate or side  # it takes the side in no other way
    try:
        encoded = tokenizer([row.text for row in rows], None if None in pairs else pairs, **options)
    finally:
        tokenizer.truncation_side = side
    examples = []
    for i, row in enumerate(rows):
        tokens = np.asarray(encoded["input_ids"][i], np.int32)
        types = np.asarray(encoded["token_type_ids"][i], np.int32) if token_types else None
        if not 0 < len(tokens) <= max_length:
            raise DataError(
                f"{row.origin}: the row has {len(tokens)} tokens, the context holds {max_length}; "
                "shorten it, or ask for truncation ('left' or 'right')."
            )
        examples.append(LabelledExample(tokens, types, labels[i], row.origin))
    logger.info("%d rows tokenised", len(examples))
    return examples


def pad_labelled_examples(
    examples: Sequence[LabelledExample], *, batch_size: int, length: int
) -> dict[str, np.ndarray]:
    """One batch of `(batch_size, length)` arrays; missing rows and tails are padding.

    Args:
        examples: at least one.
        batch_size: rows of the batch.
        length: tokens of a row.

    Returns:
        `tokens`, `positions`, `segments` (1 on tokens, 0 on padding) and, for models that have
        them, `token_types`, int32 (batch_size, length); `labels` int32 or float32 (batch_size,)
        and `weights` float32 (batch_size,), 1 for a row and 0 where one is missing.

    Example:
        >>> row = np.ones(2, np.int32)
        >>> one = LabelledExample(row, None, np.int32(3)[...], "row 1")
        >>> batch = pad_labelled_examples([one], batch_size=2, length=3)
        >>> batch["segments"].tolist(), batch["labels"].tolist(), batch["weights"].tolist()
        ([[1, 1, 0], [0, 0, 0]], [3, 0], [1.0, 0.0])
    """
    first = examples[0]
    names = ["tokens", "positions", "segments"]
    names += [] if first.token_types is None else ["token_types"]
    shape = (batch_size, length)
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in names}
    batch["labels"] = np.zeros(batch_size, first.label.dtype)
    batch["weights"] = np.zeros(batch_size, np.float32)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        batch["tokens"][row, :size] = example.tokens
        batch["positions"][row, :size] = np.arange(size)
        batch["segments"][row, :size] = 1
        if example.token_types is not None:
            batch["token_types"][row, :size] = example.token_types
        batch["labels"][row] = example.label
        batch["weights"][row] = 1
    return batch


def _label(row: LabelledRow, numbers: dict[str, int]) -> np.ndarray:
    if not numbers:
        return np.asarray(row.label, np.float32)
    number = numbers.get(str(row.label))
    if number is None:
        known = ", ".join(list(numbers)[:10]) + (", …" if len(numbers) > 10 else "")
        raise DataError(
            f"{row.origin}: the label {row.label!r} is none of the {len(numbers)} that are "
            f"learnt ({known}). Labels are those of the training rows."
        )
    return np.asarray(number, np.int32)
