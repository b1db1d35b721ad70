"""What a correction did, kernel by kernel."""

import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from emloc_jax._files import new_file
from emloc_jax.adapters._bound import Bound, check_limit
from emloc_jax.adapters._mismatch import mismatch
from emloc_jax.adapters._problem import HasSum, Problem, problems
from emloc_jax.adapters._whole import Trainable

__all__ = ["CorrectionReport", "KernelCorrection", "correction_report", "kernel_corrections"]


@dataclasses.dataclass(frozen=True)
class KernelCorrection:
    """One kernel, or one layer of a stacked kernel.

    Attributes:
      path: of the kernel, with the layer in brackets if stacked.
      rank: of the adapter.
      mismatch_before, mismatch_after: between original plus adapter and emulator plus adapter on
        span(lora_a), relative to the latter (Frobenius).
      inputs_before, inputs_after: the same over the calibration inputs; None without moments.
      bounded: share of rows (or columns; or 1 for the kernel) whose correction was cut.
      ratio: size of the correction over the size of what was learned.
    """

    path: str
    rank: int
    mismatch_before: float
    mismatch_after: float
    inputs_before: float | None
    inputs_after: float | None
    bounded: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class CorrectionReport:
    """Prints as a table and saves as JSON.

    Attributes:
      limit: what bounded the correction.
      bound: what the limit held for.
      weighted: whether the calibration-weighted form was used.
      kernels: one entry per kernel and layer.
    """

    limit: float
    bound: Bound
    weighted: bool
    kernels: tuple[KernelCorrection, ...]

    def table(self) -> Table:
        """A rich table; the last row holds means."""
        form = "calibration-weighted" if self.weighted else "plain"
        table = Table(title=f"LoRA correction ({form}, limit {self.limit:g} per {self.bound})")
        names = ["mismatch", "corrected", "bounded", "Δ / learned"]
        if self.weighted:
            names[2:2] = ["on inputs", "corrected"]
        table.add_column("kernel", overflow="fold")
        for name in ["rank", *names]:
            table.add_column(name, justify="right")
        for kernel in self.kernels:
            table.add_row(kernel.path, str(kernel.rank), *_cells(kernel))
        if self.kernels:
            table.add_section()
            table.add_row("mean", "", *_cells(self.mean()))
        return table

    def mean(self) -> KernelCorrection:
        """Means over the kernels, every kernel counted once."""
        columns = {
            field.name: [getattr(kernel, field.name) for kernel in self.kernels]
            for field in dataclasses.fields(KernelCorrection)
            if field.name not in ("path", "rank")
        }
        means = {name: None if None in v else float(np.mean(v)) for name, v in columns.items()}
        return KernelCorrection("mean", 0, **means)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=120).print(self.table())
        return buffer.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; an infinite number becomes the string 'inf'."""
        return json.loads(json.dumps(dataclasses.asdict(self)), parse_constant=lambda _: "inf")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON to a new file.

        Raises:
          OutputExistsError: `path` exists.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        with new_file(path) as temporary:
            temporary.write_text(text + "\n")


def correction_report(
    adapters: Mapping[str, Trainable],
    params: Mapping[str, Any],
    emulator: Mapping[str, Any],
    *,
    limit: float = 3.0,
    moments: Mapping[str, HasSum] | None = None,
    bound: Bound = "row",
) -> CorrectionReport:
    """Measures what `correct` does with the same arguments.

    Args:
      adapters: uncorrected, as given to `correct`.
      params: see `correct`.
      emulator: see `correct`.
      limit: see `correct`; 0 reports the mismatch without correction.
      moments: see `correct`.
      bound: see `correct`.

    Returns:
      The report, in the order of `adapters`; without what was trained whole.

    Raises:
      AdapterMismatchError, MomentShapeError, NonFiniteError, RatioError: see `correct`.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.adapters import Adapter
      >>> adapters = {"kernel": Adapter(jnp.eye(2), jnp.ones((2, 2)), alpha=2.0)}
      >>> params, emulator = {"kernel": jnp.eye(2)}, {"kernel": jnp.ones((2, 2))}
      >>> report = correction_report(adapters, params, emulator, limit=3.0)
      >>> round(report.mean().mismatch_before, 3), report.mean().mismatch_after
      (0.354, 0.0)
    """
    check_limit(limit, bound)
    limit = float(limit)  # one compilation, whichever kind of number it is
    entries = []
    for problem in problems(adapters, params, emulator, moments):
        entries += kernel_corrections(problem, limit, bound)
    return CorrectionReport(limit, bound, moments is not None, tuple(entries))


def kernel_corrections(problem: Problem, limit: float, bound: Bound) -> list[KernelCorrection]:
    """One kernel's entry of the report, or one per layer of a stack."""
    adapter = problem.adapter
    figures = mismatch(
        problem.terms(), *problem.matrices(), problem.moment, adapter.scale, limit, bound=bound
    )
    columns = [None if value is None else np.asarray(value) for value in figures]
    return [
        KernelCorrection(
            problem.path + (f"[{','.join(map(str, layer))}]" if layer else ""),
            adapter.rank,
            *(None if column is None else float(column[layer]) for column in columns),  # pyright: ignore[reportArgumentType]
        )
        for layer in np.ndindex(adapter.stack_shape)
    ]


def _cells(kernel: KernelCorrection) -> list[str]:
    cells = [f"{kernel.mismatch_before:.3f}", f"{kernel.mismatch_after:.3f}"]
    if kernel.inputs_before is not None and kernel.inputs_after is not None:
        cells += [f"{kernel.inputs_before:.3f}", f"{kernel.inputs_after:.3f}"]
    ratio = "∞" if math.isinf(kernel.ratio) else f"{kernel.ratio:.2f}"
    return [*cells, f"{kernel.bounded:.0%}", ratio]
