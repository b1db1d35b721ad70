"""Raw records of JSONL, JSON and CSV files, each with its file name and line number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_jax.errors import DataError

__all__ = ["read_records"]


def read_records(path: str | PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Pairs of origin (`name:line`) and record, in file order.

    Args:
        path: a UTF-8 file that ends in `.jsonl`, `.json` or `.csv`.

    Raises:
        DataError: the file is missing or of another kind, or a line of it is malformed.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path}: rows are read from files that end in {', '.join(readers)}; "
            f"this one ends in {path.suffix!r}."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}).") from error
    return readers[path.suffix.lower()](path, text)


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # split("\n"), not splitlines(): JSON strings may hold other line separators unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not a JSON object ({error.msg} at column {error.colno})."
            ) from error


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # The list is walked element by element, so that every row knows its line.
    decoder = json.JSONDecoder()
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(
            f"{path}:1: a .json file must hold one list of rows; "
            "for one object per line name the file .jsonl."
        )
    at = _skip(text, at + 1)
    line, counted = 1, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}).") from error
        yield f"{path}:{line}", record
        at = _skip(text, at)
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", counted, at)
            raise DataError(f"{path}:{line}: the list of rows goes on neither with ',' nor ']'.")
        closed = text[at] == "]"
        if not closed:
            at = _skip(text, at + 1)
    at = _skip(text, at + 1)
    if at < len(text):
        line += text.count("\n", counted, at)
        raise DataError(f"{path}:{line}: something follows the list of rows.")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # A quoted cell may hold newlines: the reader needs them as they are, and a row's line is
    # the one on which it starts.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) != len(header):
                    raise DataError(f"{path}:{start}: a column name stands twice: {header}.")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(cells)} cells, but the header has {len(header)} "
                    f"columns {header}."
                )
            yield f"{path}:{start}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV ({error}).") from error
