"""What each stage of a run took: memory of every kind, disk and time, beside what was predicted."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from emloc_jax._bytes import format_bytes
from emloc_jax.memory._ledger_device import device_readings, pinned_bytes
from emloc_jax.memory._ledger_files import FileMark, bytes_left, files_in, storage_bytes
from emloc_jax.memory._ledger_peak import Peak, Reading, highest, peak_between
from emloc_jax.memory._resident import reset_resident_peak, resident_reading

__all__ = ["Ledger", "OpenStage", "StageFigures"]

_MISSING = "not measured"


@dataclasses.dataclass(frozen=True)
class StageFigures:
    """What a stage took; None: not measured here.

    Attributes:
      stage: its name.
      visits: how often it was entered; figures are of all visits together.
      seconds: inside of it.
      predicted_bytes: device bytes that somebody said it would take at its peak.
      device_peak: device bytes in use, of the device that used most.
      pinned_host_bytes: of JAX arrays in page-locked memory, where the stage began or ended.
      resident_peak: bytes of the process in main memory.
      resident_after_bytes: the same when the stage ended.
      left_bytes: of the files that it left in the run's folder.
      storage_bytes: sent to disks by the process, as the kernel counts, other threads included.
    """

    stage: str
    visits: int
    seconds: float
    predicted_bytes: int | None
    device_peak: Peak | None
    pinned_host_bytes: int | None
    resident_peak: Peak | None
    resident_after_bytes: int | None
    left_bytes: int | None
    storage_bytes: int | None

    def joined(self, later: "StageFigures") -> "StageFigures":
        """These figures and those of a later visit: times and bytes written add up."""
        return StageFigures(
            self.stage,
            self.visits + later.visits,
            self.seconds + later.seconds,
            _most(self.predicted_bytes, later.predicted_bytes),
            highest([self.device_peak, later.device_peak]),
            _most(self.pinned_host_bytes, later.pinned_host_bytes),
            highest([self.resident_peak, later.resident_peak]),
            later.resident_after_bytes,
            _sum(self.left_bytes, later.left_bytes),
            _sum(self.storage_bytes, later.storage_bytes),
        )


class OpenStage:
    """A stage that goes on.

    Attributes:
      predicted: device bytes it should take at its peak; may be set until the stage ends.
    """

    def __init__(self, predicted: int | None, folder: Path | None):
        self.predicted = predicted
        self._files: dict[str, FileMark] | None = files_in(folder)
        self._storage = storage_bytes()
        self._pinned = pinned_bytes()
        self._devices = device_readings()
        self._earlier: Peak | None = None  # of the resident set, before an inner stage's reset
        self._resident = resident_reading()
        self._began = time.perf_counter()

    def cut(self, reset: Reading, before: Reading) -> None:
        """Keeps the resident set's peak so far (`before`), since its counter was `reset`."""
        self._earlier = highest([self._earlier, peak_between(self._resident, before)])
        self._resident = reset

    def close(self, name: str, folder: Path | None) -> StageFigures:
        """Figures from the beginning until now."""
        seconds = time.perf_counter() - self._began
        resident, devices = resident_reading(), device_readings()
        between = peak_between(self._resident, resident)
        return StageFigures(
            stage=name,
            visits=1,
            seconds=seconds,
            predicted_bytes=None if self.predicted is None else int(self.predicted),
            device_peak=highest(map(peak_between, self._devices, devices)),
            pinned_host_bytes=_most(self._pinned, pinned_bytes()),
            resident_peak=highest([self._earlier, between]),
            resident_after_bytes=resident.now,
            left_bytes=bytes_left(self._files, files_in(folder)),
            storage_bytes=_since(self._storage, storage_bytes()),
        )


class Ledger:
    """Records every stage of a run; it costs milliseconds a stage and never makes a run fail.

    What the machine does not tell is None, and "not measured" in the table. The peak of the
    resident set is per stage where the operating system lets it start anew (Linux); that resets
    the process's own counter, which `getrusage` reads too. Peaks that cannot start anew (XLA's
    allocators, other systems) are given as bounds, see `peak_between`.

    Args:
      folder: of the run; files that a stage leaves there are its bytes written.

    Example:
      >>> ledger = Ledger()
      >>> with ledger.stage("training", predicted=2**20) as stage:
      ...     stage.predicted = 2**21  # known only now
      >>> [(row.stage, row.predicted_bytes) for row in ledger.rows]
      [('training', 2097152)]
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, StageFigures] = {}
        self._open: list[OpenStage] = []
        self._resets = True

    @property
    def rows(self) -> tuple[StageFigures, ...]:
        """Figures of the stages that ended, in the order in which they first did."""
        return tuple(self._rows.values())

    @contextlib.contextmanager
    def stage(self, name: str, predicted: int | None = None) -> Iterator[OpenStage]:
        """Records what happens inside of the `with` block; an error in it goes on as it is.

        Args:
          name: of the stage; a second visit joins the first.
          predicted: device bytes at its peak, from an analysis of its compiled programs, say.

        Yields:
          The stage, whose `predicted` may still be set.
        """
        before = resident_reading()
        self._resets = reset_resident_peak() and self._resets
        fresh = resident_reading()
        for outer in self._open:
            outer.cut(fresh, before)
        stage = OpenStage(predicted, self.folder)
        self._open.append(stage)
        try:
            yield stage
        finally:
            self._open.remove(stage)
            row = stage.close(name, self.folder)
            known = self._rows.get(name)
            self._rows[name] = row if known is None else known.joined(row)

    def to_dict(self) -> dict[str, Any]:
        """JSON types: where the figures come from, and the stages."""
        return {
            "sources": {
                "predicted": "XLA's memory analysis of compiled programs",
                "device_peak": "allocator statistics, monotone since the start",
                "pinned_host": "live arrays of kind pinned_host at the stage's edges",
                "resident_peak": "operating system, "
                + ("per stage" if self._resets else "monotone since the start"),
                "left": "files in the run's folder",
                "storage": "/proc/self/io write_bytes",
            },
            "stages": [dataclasses.asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """For people: one line per stage. `<=`: below the peak of an earlier stage."""
        columns = {
            "seconds": [f"{row.seconds:.1f}" for row in self.rows],
            "predicted": [_bytes(row.predicted_bytes, "") for row in self.rows],
            "device": [_peak(row.device_peak) for row in self.rows],
            "pinned": [_bytes(row.pinned_host_bytes) for row in self.rows],
            "resident": [_peak(row.resident_peak) for row in self.rows],
            "written": [_bytes(row.left_bytes) for row in self.rows],
        }
        absent = [name for name, cells in columns.items() if set(cells) == {_MISSING}]
        table = Table(title="Ledger: peaks of memory, and bytes written")
        table.caption = f"{_MISSING} here: {', '.join(absent)}" if absent else None
        table.add_column("stage", no_wrap=True)
        shown = {name: cells for name, cells in columns.items() if name not in absent}
        for name in shown:
            table.add_column(name, justify="right")
        for row, *cells in zip(self.rows, *shown.values(), strict=True):
            table.add_row(row.stage, *cells)
        return table


def _most(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return max(known) if known else None


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


def _since(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _bytes(count: int | None, missing: str = _MISSING) -> str:
    return missing if count is None else format_bytes(count)


def _peak(peak: Peak | None) -> str:
    if peak is None:
        return _MISSING
    return ("" if peak.exact else "<= ") + format_bytes(peak.at_most)
