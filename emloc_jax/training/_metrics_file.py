"""The file `metrics.jsonl` of a run: one line per record, in step order."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_jax.errors import CheckpointError

__all__ = ["MetricsFile", "read_metrics"]


def read_metrics(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off by a kill is left out.

    Raises:
        CheckpointError: a whole line that is not a record.
    """
    return [record for record, _ in _read(Path(path))]


class MetricsFile:
    """Appends records, each handed to the system at once.

    Args:
        path: the file; made if it is not there.
        after: records of later steps are dropped first, since a resumed run makes them again.
    """

    def __init__(self, path: str | PathLike[str], *, after: int = 0):
        self._path = Path(path)
        self.records: list[dict[str, Any]] = []
        if self._path.exists():
            kept = [(r, size) for r, size in _read(self._path) if r["step"] <= after]
            self.records = [record for record, _ in kept]
            # One call, so a kill leaves the old length or the new one.
            with self._path.open("r+b") as file:
                file.truncate(sum(size for _, size in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Writes one record, which has a `step`.

        Raises:
            CheckpointError: the line could not be written (a full disk).
        """
        self.records.append(record)
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: a line could not be written ({error.strerror or error}); make "
                "room, then resume."
            ) from error

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError:  # the disk is full still; append has said so
            pass


def _read(path: Path) -> list[tuple[dict[str, Any], int]]:
    lines = path.read_bytes().split(b"\n")[:-1]  # a whole line ends, so the last piece is no line
    try:
        return [(json.loads(line), len(line) + 1) for line in lines]
    except ValueError as error:
        raise CheckpointError(
            f"{path}: a line is not a record ({error}); move the file away to go on."
        ) from error
