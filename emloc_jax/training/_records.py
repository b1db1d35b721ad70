"""Raw records of JSONL, JSON, CSV and TSV files, each with its file name and line number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_jax.errors import DataError

__all__ = ["Source", "named_records", "read_records", "read_tsv"]

Source = str | PathLike[str] | Iterable[Mapping[str, Any]]


def named_records(source: Source) -> tuple[Iterator[tuple[str, Any]], str]:
    """Pairs of origin and record of a file or of any iterable, and what to call the source.

    Args:
        source: a path, see `read_records`, or an iterable of mappings.

    Raises:
        DataError: see `read_records`.
    """
    if isinstance(source, str | PathLike):
        return read_records(source), str(source)
    return ((f"row {i}", record) for i, record in enumerate(source, 1)), "the given rows"


def read_records(path: str | PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Pairs of origin (`name:line`) and record, in file order.

    Args:
        path: a UTF-8 file that ends in `.jsonl`, `.json`, `.csv` or `.tsv`.

    Raises:
        DataError: the file is missing or of another kind, or a line of it is malformed.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path}: rows are read from files that end in {', '.join(readers)}; "
            f"this one ends in {path.suffix!r}."
        )
    return readers[path.suffix.lower()](path, _text(path))


def read_tsv(
    path: str | PathLike[str],
    *,
    header: Sequence[str] | None = None,
    on_broken: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Records of a tab-separated file in which nothing is quoted.

    Args:
        path: a UTF-8 file.
        header: names of the columns where the file does not begin with them.
        on_broken: called with the reason for each line that has another number of cells, which is
            left out; None: such a line is refused.

    Raises:
        DataError: see `read_records`.
    """
    path = Path(path)
    return _tsv(path, _text(path), header, on_broken)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}).") from error


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
                header = _header(cells, f"{path}:{start}")
                continue
            if len(cells) != len(header):
                raise DataError(_count(cells, header, f"{path}:{start}"))
            yield f"{path}:{start}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV ({error}).") from error


def _tsv(
    path: Path,
    text: str,
    header: Sequence[str] | None = None,
    on_broken: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        cells = line.removesuffix("\r").split("\t")
        if header is None:
            header = _header(cells, f"{path}:{number}")
        elif len(cells) == len(header):
            yield f"{path}:{number}", dict(zip(header, cells, strict=True))
        elif on_broken is None:
            raise DataError(_count(cells, header, f"{path}:{number}"))
        else:
            on_broken(_count(cells, header, f"{path}:{number}"))


def _header(cells: list[str], origin: str) -> list[str]:
    if len(set(cells)) != len(cells):
        raise DataError(f"{origin}: a column name stands twice: {cells}.")
    return cells


def _count(cells: Sequence[str], header: Sequence[str], origin: str) -> str:
    return f"{origin}: {len(cells)} cells, but there are {len(header)} columns {list(header)}."
