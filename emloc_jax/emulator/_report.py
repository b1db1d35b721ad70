"""What compression did to each kernel."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from emloc_jax._files import new_file
from emloc_jax.errors import CheckpointError

__all__ = ["CompressionReport", "KernelReport"]

Status = Literal["compressed", "kept", "skipped", "unsupported"]


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One kernel of a `CompressionReport`.

    Attributes:
      path: of the kernel.
      shape: of the stored array, stack axes included.
      rank: of the factors; None for a whole kernel.
      ratio: numbers kept / numbers before.
      calibration_error: `||X (K - K_E)|| / ||X K||` on the calibration inputs, measured with the
        factors as stored; `||K - K_E|| / ||K||` without calibration. With a compact moment what
        rounding the factors adds is estimated (see `calibrate`). None for a whole kernel.
      weighted_error: the error that was minimised over the norm it was measured in, from the
        spectrum. None for a whole kernel.
      bytes_before, bytes_after: of the arrays.
      status: `compressed`, `kept` (would not shrink, no rule for it, or tied), `skipped` (on the
        skip list) or `unsupported` (no handler).
      reason: why it is whole; empty if it is not.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    ratio: float
    calibration_error: float | None
    weighted_error: float | None
    bytes_before: int
    bytes_after: int
    status: Status
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What `compress` did, kernel by kernel.

    Attributes:
      kernels: one entry per kernel of the model, in order.
      weighting: `two_sided`, `one_sided` or `plain`.

    Example:
      >>> entry = KernelReport("up/kernel", (8, 8), 2, 0.5, 0.1, 0.1, 256, 128, "compressed")
      >>> report = CompressionReport((entry,), "one_sided")
      >>> report.ratio, report["up/kernel"].rank
      (0.5, 2)
    """

    kernels: tuple[KernelReport, ...]
    weighting: str

    def __iter__(self) -> Iterator[KernelReport]:
        return iter(self.kernels)

    def __getitem__(self, path: str) -> KernelReport:
        return next(k for k in self.kernels if k.path == path)

    @property
    def ranks(self) -> dict[str, int | None]:
        """Rank by path; None for whole kernels."""
        return {kernel.path: kernel.rank for kernel in self.kernels}

    @property
    def bytes_before(self) -> int:
        """Bytes of all kernels of the original."""
        return sum(kernel.bytes_before for kernel in self.kernels)

    @property
    def bytes_after(self) -> int:
        """Bytes of all kernels of the emulator."""
        return sum(kernel.bytes_after for kernel in self.kernels)

    @property
    def ratio(self) -> float:
        """Kept share of all kernels' bytes."""
        return self.bytes_after / self.bytes_before

    def table(self) -> Table:
        """A `rich` table; `str(report)` is the same as plain text."""
        table = Table(title=f"Compression, {self.weighting.replace('_', '-')}")
        table.add_column("kernel", overflow="fold")
        for name in ("shape", "rank", "ratio", "error", "MiB before", "MiB after"):
            table.add_column(name, justify="right")
        table.add_column("status", overflow="fold")
        for k in self.kernels:
            error = "" if k.calibration_error is None else f"{k.calibration_error:.4f}"
            status = k.status + (f": {k.reason}" if k.reason else "")
            shape, rank = "x".join(map(str, k.shape)), "" if k.rank is None else str(k.rank)
            sizes = (_mebibytes(k.bytes_before), _mebibytes(k.bytes_after))
            table.add_row(k.path, shape, rank, f"{k.ratio:.3f}", error, *sizes, status)
        table.add_section()
        count = sum(k.status == "compressed" for k in self.kernels)
        sizes = (_mebibytes(self.bytes_before), _mebibytes(self.bytes_after))
        label = f"{count} of {len(self.kernels)} compressed"
        table.add_row("all", "", "", f"{self.ratio:.3f}", "", *sizes, label)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "weighting": self.weighting,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report to a new JSON file.

        Raises:
          OutputExistsError: `path` exists.
        """
        with new_file(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompressionReport":
        """Inverse of `to_dict`."""
        kernels = (KernelReport(**{**k, "shape": tuple(k["shape"])}) for k in values["kernels"])
        return cls(tuple(kernels), values["weighting"])

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CompressionReport":
        """Reads a report that `save` wrote.

        Raises:
          CheckpointError: the file is missing or is not such a report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a compression report: {error!r}.") from error


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f}"
