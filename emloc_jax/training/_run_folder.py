"""The folder of a run: its checkpoints and its metrics, opened afresh or to go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_jax.errors import OutputExistsError, ResumeError
from emloc_jax.training._metrics_file import MetricsFile
from emloc_jax.training._run_checkpoints import RunCheckpoints, config_differences
from emloc_jax.training._state import TrainState

__all__ = ["RunFolder", "UnsavedRun"]

logger = logging.getLogger(__name__)


class UnsavedRun:
    """A run without a folder: records are kept in memory and nothing is saved."""

    saves = False

    def __init__(self):
        self.records: list[dict[str, Any]] = []

    def restore(self, state: TrainState, stream: Iterator) -> tuple[TrainState, int | None]:
        """The state as it is."""
        del stream
        return state, None

    def append(self, record: dict[str, Any]) -> None:
        """Keeps a record."""
        self.records.append(record)

    def save(self, number: int, state: TrainState, position: Any) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class RunFolder:
    """A run that is saved below `folder`: `checkpoints/` and `metrics.jsonl`.

    Raises:
        OutputExistsError: the folder holds a run already and `resume` is not set.
    """

    saves = True

    def __init__(
        self, folder: str | PathLike[str], *, resume: bool, config: dict[str, Any], keep: int
    ):
        self.records: list[dict[str, Any]] = []
        self._folder = Path(folder)
        self._resume = resume
        self._config = config
        self._metrics_path = self._folder / "metrics.jsonl"
        checkpoints = self._folder / "checkpoints"
        if not resume:
            for path in (checkpoints, self._metrics_path):
                if path.exists():
                    raise OutputExistsError(
                        f"{path} exists already: {self._folder} holds a run. Resume it, or give "
                        "another folder."
                    )
        self._checkpoints = RunCheckpoints(checkpoints, keep=keep)
        self._metrics: MetricsFile | None = None

    def restore(self, state: TrainState, stream: Iterator) -> tuple[TrainState, int | None]:
        """The newest saved state, with the stream moved to its place; or `state` if none is saved.

        Raises:
            ResumeError: the saved run had another config, other data or another structure.
        """
        latest = self._checkpoints.latest() if self._resume else None
        if latest is None:
            if self._resume:
                logger.warning("%s: no whole checkpoint, starting from step 0", self._folder)
            self._open_metrics(after=0)
            return state, None
        differences = config_differences(self._checkpoints.config(latest), self._config)
        if differences:
            raise ResumeError(
                f"{self._folder}: the saved run had another config: {'; '.join(differences)}. "
                "Resume with the saved values, or give another folder."
            )
        state, position = self._checkpoints.restore(latest, state)
        stream.set_state(position)  # type: ignore[attr-defined]
        self._open_metrics(after=latest)
        logger.info("%s: resumed from step %d", self._folder, latest)
        return state, latest

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record to `metrics.jsonl`."""
        assert self._metrics is not None
        self._metrics.append(record)

    def save(self, number: int, state: TrainState, position: Any) -> None:
        """Starts to write the checkpoint of step `number`."""
        self._checkpoints.save(number, state, position, self._config)

    def finish(self) -> None:
        """Waits until everything is written; raises if something could not be."""
        self._checkpoints.wait()

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        try:
            self._checkpoints.close()
        except Exception as error:  # must not hide the error that ends the run
            if exception[0] is None:
                raise
            logger.warning("%s: the checkpoints could not be closed (%s)", self._folder, error)

    def _open_metrics(self, *, after: int) -> None:
        self._metrics = MetricsFile(self._metrics_path, after=after)
        self.records = self._metrics.records
