"""Rows to classify: a text or a pair of texts, and a label."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training._records import Source, named_records
from emloc_jax.training._rows import as_mapping, fill

__all__ = ["LabelledRow", "label_of", "read_labelled_rows", "text_of"]

logger = logging.getLogger(__name__)

_FIELDS = ("text", "text_pair", "label")


@dataclass(frozen=True)
class LabelledRow:
    """One row to learn or test a classifier on.

    Attributes:
        origin: where the row stands, for messages: `data.csv:12` or `row 12`.
        text: what is classified.
        text_pair: the second text of a pair, or None.
        label: the name of its class; a number where a number is to be predicted.
    """

    origin: str
    text: str
    text_pair: str | None
    label: str | float


def read_labelled_rows(
    source: Source, *, columns: Mapping[str, str] | None = None
) -> list[LabelledRow]:
    """Rows with labels of a file, as `read_rows` takes it, or of any iterable of mappings.

    Args:
        source: a path or an iterable of mappings.
        columns: `{"text": ..., "label": ...}` and, for pairs, `"text_pair"`, in terms of the
            source's own columns; a value with braces is a template over the columns. By default
            the columns of these very names.

    Returns:
        At least one row. A whole number as label counts as its digits.

    Raises:
        DataError: no row, or a malformed one (the message names file and line).
        ConfigError: missing or unknown keys in `columns`.

    Example:
        >>> rows = [{"text": "Where is my card?", "category": "card_arrival"}]
        >>> (row,) = read_labelled_rows(rows, columns={"text": "text", "label": "category"})
        >>> row.text, row.label
        ('Where is my card?', 'card_arrival')
    """
    columns = {"text": "text", "label": "label"} if columns is None else columns
    if not {"text", "label"} <= set(columns) <= set(_FIELDS):
        raise ConfigError(
            f"columns has the keys {sorted(columns)}; rows to classify need 'text' and 'label', "
            "and for pairs 'text_pair'."
        )
    records, name = named_records(source)
    rows = []
    for origin, record in records:
        pair = text_of(origin, record, columns["text_pair"]) if "text_pair" in columns else None
        text = text_of(origin, record, columns["text"])
        if not text.strip() and not (pair or "").strip():
            raise DataError(f"{origin}: the text is empty, so there is nothing to classify.")
        label = fill(origin, record, columns["label"])
        rows.append(LabelledRow(origin, text, pair, label_of(origin, columns["label"], label)))
    if not rows:
        raise DataError(f"{name}: no row found; at least one is needed.")
    logger.info("%s: %d rows", name, len(rows))
    return rows


def text_of(origin: str, record: Any, column: str) -> str:
    """The text in a column.

    Raises:
        DataError: the column is missing or holds no text.
    """
    value = fill(origin, as_mapping(origin, record), column)
    if not isinstance(value, str):
        raise DataError(
            f"{origin}: column {column!r} must be text, found {type(value).__name__} {value!r:.60}."
        )
    return value


def label_of(origin: str, column: str, value: Any) -> str:
    """The label in a column: a name, or a whole number as its digits.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{origin}: the label (column {column!r}) must be a name or a whole number, found "
            f"{value!r:.60}."
        )
    return value
