"""Training rows: a prompt with its completion, or a chat, each with the place it came from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training._image_parts import flat_turn, image_paths
from emloc_jax.training._records import Source, named_records

__all__ = ["Row", "as_mapping", "fill", "read_rows", "to_row"]

logger = logging.getLogger(__name__)

_FIELDS = ("prompt", "completion", "messages")
_IMAGES = {"image", "images"}


@dataclass(frozen=True)
class Row:
    """One row: either `prompt` and `completion`, or `messages`.

    Attributes:
        origin: where the row stands, for messages: `data.jsonl:12` or `row 12`.
        prompt: text that is given.
        completion: text that is learnt.
        messages: the turns of a chat, `{"role": ..., "content": ...}` each.
        images: files of its images, in the order of their places in the text.
    """

    origin: str
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    images: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The text a good answer equals: the completion, or the last assistant turn."""
        if self.messages is None:
            return self.completion or ""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "assistant")


def read_rows(source: Source, *, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of a JSONL, JSON, CSV or TSV file, or of any iterable of mappings (HF `datasets` too).

    Args:
        source: a path that ends in `.jsonl`, `.json` (a list of objects), `.csv` or `.tsv`
            (nothing is quoted), or an iterable of mappings.
        columns: `{"prompt": ..., "completion": ...}` or `{"messages": ...}` in terms of the
            source's own columns. A value with braces is a template over the columns. Without it
            the source must have these very names. Besides, `image` or `images` names the path of
            an image or a list of such, relative to the source's folder; `<image>` in the text says
            where they stand. Turns may be in parts, as chat templates have them:
            `[{"type": "image", "image": path}, {"type": "text", "text": ...}]`.

    Returns:
        At least one row.

    Raises:
        DataError: no row, or a malformed one (the message names file and line).
        ConfigError: an unknown key in `columns`.

    Example:
        >>> rows = read_rows(
        ...     [{"question": "1 + 1?", "answer": "2"}],
        ...     columns={"prompt": "Question: {question}\\nAnswer:", "completion": " {answer}"},
        ... )
        >>> rows[0].prompt, rows[0].completion, rows[0].origin
        ('Question: 1 + 1?\\nAnswer:', ' 2', 'row 1')
    """
    if columns is not None:
        _check_columns(columns)
    records, name = named_records(source)
    folder = Path(source).parent if isinstance(source, str | PathLike) else Path()
    rows = [to_row(origin, record, columns, folder) for origin, record in records]
    if not rows:
        raise DataError(f"{name}: no row found; at least one is needed.")
    logger.info("%s: %d rows", name, len(rows))
    return rows


def _check_columns(columns: Mapping[str, str]) -> None:
    text = set(columns) - _IMAGES
    unknown = sorted(text - set(_FIELDS))
    chat, pair = "messages" in text, {"prompt", "completion"} <= text
    if unknown or chat == pair or (chat and len(text) > 1) or _IMAGES <= set(columns):
        raise ConfigError(
            f"columns has the keys {sorted(columns)}; it must have 'prompt' and 'completion', "
            "or 'messages' alone, and 'image' or 'images' where rows have them."
        )


def to_row(
    origin: str, record: Any, columns: Mapping[str, str] | None, folder: Path = Path()
) -> Row:
    """One row of a record, whose images lie in `folder`; see `read_rows`."""
    if columns is None:
        columns = _guess(origin, as_mapping(origin, record))
    values = {field: fill(origin, record, column) for field, column in columns.items()}
    images = [values.pop(name) for name in sorted(_IMAGES) if name in values]
    paths = image_paths(origin, images[0] if images else [], folder)
    if "messages" in values:
        turns, inside = _messages(origin, values["messages"])
        return Row(origin, messages=turns, images=paths + image_paths(origin, inside, folder))
    for field, value in values.items():
        if not isinstance(value, str):
            raise DataError(
                f"{origin}: the {field} (column {columns[field]!r}) must be text, "
                f"found {type(value).__name__} {value!r:.60}."
            )
    if not values["completion"].strip():
        raise DataError(f"{origin}: the completion is empty, so there is nothing to learn.")
    return Row(origin, prompt=values["prompt"], completion=values["completion"], images=paths)


def _guess(origin: str, record: Mapping[str, Any]) -> dict[str, str]:
    chat, pair = "messages" in record, "prompt" in record and "completion" in record
    if chat and pair:
        raise DataError(
            f"{origin}: the row has 'messages' and also 'prompt' and 'completion'; "
            "say with columns which of them to use."
        )
    if not chat and not pair:
        raise DataError(
            f"{origin}: the row has the fields {sorted(map(str, record))}; it needs 'prompt' and "
            "'completion', or 'messages'. Map other names with columns."
        )
    named = ["messages"] if chat else ["prompt", "completion"]
    named += [name for name in sorted(_IMAGES) if record.get(name)][:1]
    return {name: name for name in named}


def as_mapping(origin: str, record: Any) -> Mapping[str, Any]:
    """The record, if it has named fields.

    Raises:
        DataError: it has none.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{origin}: a row is an object with named fields, found {record!r:.60}.")
    return record


def fill(origin: str, record: Any, column: str) -> Any:
    """The value of a column, or a template with braces filled from all columns.

    Raises:
        DataError: a column that the record lacks, or that is null.
    """
    record = as_mapping(origin, record)
    filled = {key: value for key, value in record.items() if value is not None}
    try:
        return column.format_map(filled) if "{" in column else filled[column]
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"{origin}: column {column!r} cannot be filled ({type(error).__name__}: {error}); "
            f"the row fills the fields {sorted(map(str, filled))}."
        ) from error


def _messages(origin: str, value: Any) -> tuple[tuple[Mapping[str, Any], ...], list[Any]]:
    """Turns whose content is text, and the images that stood in them."""
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{origin}: messages must be a list of turns, found {value!r:.60}.")
    value, images = [flat_turn(message) for message in value], []
    for turn, (message, inside) in enumerate(value, 1):
        images += inside
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"{origin}: turn {turn} of messages must have a textual 'role' and 'content', "
                f"found {message!r:.80}."
            )
    turns = tuple(message for message, _ in value)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in turns):
        raise DataError(f"{origin}: messages has no assistant turn, so there is nothing to learn.")
    return turns, images
