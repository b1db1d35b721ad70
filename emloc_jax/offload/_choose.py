"""The largest subspace whose transfers stay hidden and that the memory has room for."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from emloc_jax.errors import ConfigError, PlanError, ProjectorError
from emloc_jax.offload._cost_model import Hardware, Prediction, predict
from emloc_jax.offload._workload import Setting, Subspace, Workload

__all__ = ["Candidate", "Choice", "choose", "default_sizes"]

_FRACTIONS = (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting that was looked at.

    Attributes:
      setting: it.
      prediction: what it would take; None when it is impossible for a kernel.
      reasons: why it was rejected; empty when it keeps all limits.
    """

    setting: Setting
    prediction: Prediction | None
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best setting, and all that were looked at.

    Attributes:
      setting: the best.
      prediction: its.
      candidates: all, in order of size.
    """

    setting: Setting
    prediction: Prediction
    candidates: tuple[Candidate, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per candidate: setting, predicted figures if any, and `verdict`."""
        rows = []
        for candidate in self.candidates:
            setting, prediction = candidate.setting, candidate.prediction
            verdict = "; ".join(candidate.reasons) or "fits"
            rows.append(
                {
                    "subspace": setting.subspace,
                    "nnz": setting.nnz,
                    "wire": setting.wire,
                    **({} if prediction is None else prediction.row()),
                    "verdict": "chosen" if setting == self.setting else verdict,
                }
            )
        return rows


def choose(
    hardware: Hardware,
    workload: Workload,
    *,
    slowdown: float = 1.10,
    sizes: Sequence[Subspace] | None = None,
    nnz: Sequence[int] = (4, 8),
    wires: Sequence[str] = ("bfloat16", "float32"),
    schedule: str = "lsp",
    cached: bool = False,
) -> Choice:
    """Tries every setting and takes the best that keeps all limits.

    A larger subspace holds more of a gradient, so it is best; between settings of one size the
    larger `nnz`, whose fit is closer; then the faster wire.

    Args:
      hardware: figures of the machine, its memory among them.
      workload: the model and batch.
      slowdown: longest iteration, as a multiple of Adam in device memory (which need not fit).
      sizes: subspaces to try. None: `default_sizes`.
      nnz: non-zeros per row to try.
      wires: dtypes to try.
      schedule: `lsp` or `lsp_serial`.
      cached: whether the projectors' dense copies are kept.

    Raises:
      PlanError: nothing fits; the message says which limit would have to give, and how far.
      ConfigError: nothing to try, or figures that do not suffice.

    Example:
      >>> from emloc_jax.offload._workload import BlockShape
      >>> machine = Hardware(16e9, 16e9, 1e9, forward_seconds=0.012, backward_seconds=0.028)
      >>> work = Workload((BlockShape(((4096, 4096),) * 12),) * 8, tokens=512)
      >>> print(choose(machine, work, sizes=[512, 1024, 2048]).setting)
      subspace 1024, nnz 8, bfloat16 wire
    """
    sizes = default_sizes(workload) if sizes is None else sizes
    settings = [Setting(size, n, wire, cached) for size in sizes for n in nnz for wire in wires]
    if not settings or not slowdown > 0:
        raise ConfigError(
            f"There is nothing to choose from: {len(sizes)} sizes, {len(nnz)} values of nnz, "
            f"{len(wires)} wire dtypes, slow-down {slowdown}. Give at least one of each."
        )
    candidates = [_judge(hardware, workload, schedule, setting, slowdown) for setting in settings]
    candidates.sort(key=_value)
    fitting = [c for c in candidates if not c.reasons]
    if not fitting:
        raise PlanError(_what_must_give(candidates, hardware, slowdown))
    best = fitting[-1]
    assert best.prediction is not None
    return Choice(best.setting, best.prediction, tuple(candidates))


def default_sizes(workload: Workload) -> tuple[Subspace, ...]:
    """Sizes worth trying, for projectors of one size or, where kernels differ much, of fractions.

    Whole numbers from 1/16 of the smallest side of all kernels to all of it. Where that side is
    less than half of the median side (grouped key and value heads), one number for all would cut
    the large kernels short: fractions of each side instead.

    Example:
      >>> from emloc_jax.offload._workload import BlockShape
      >>> default_sizes(Workload((BlockShape(((1024, 1024),)),), tokens=1))
      (64, 96, 128, 192, 256, 384, 512, 768, 1024)
    """
    sides = [side for block in workload.blocks for kernel in block.kernels for side in kernel]
    if not sides:
        raise ConfigError("The workload has no kernel to compress; give `kernels` to its blocks.")
    if 2 * min(sides) < statistics.median(sides):
        return _FRACTIONS
    return tuple(sorted({max(1, round(part * min(sides))) for part in _FRACTIONS}))


def _judge(
    hardware: Hardware, workload: Workload, schedule: str, setting: Setting, slowdown: float
) -> Candidate:
    try:
        prediction = predict(hardware, workload, schedule, setting)
    except ProjectorError as error:
        return Candidate(setting, None, (str(error),))
    reasons = []
    if prediction.slowdown > slowdown:
        reasons.append(
            f"{prediction.slowdown:.2f} x native, above {slowdown:.2f}: {_slowest(prediction)}"
        )
    for where, needed, limit in _memory(prediction, hardware):
        if limit is not None and needed > limit:
            reasons.append(f"{_giga(needed)} on the {where}, above {_giga(limit)}")
    return Candidate(setting, prediction, tuple(reasons))


def _memory(
    prediction: Prediction, hardware: Hardware
) -> tuple[tuple[str, int, int | None], tuple[str, int, int | None]]:
    return (
        ("device", prediction.device_bytes, hardware.device_memory),
        ("host", prediction.host_bytes, hardware.host_memory),
    )


def _slowest(prediction: Prediction) -> str:
    """What keeps the iteration long, in words."""
    sums = prediction.times.total
    lanes = {"the download": "d2h", "Adam on the host": "host", "the upload": "h2d"}
    name = max(lanes, key=lambda name: sums[lanes[name]])
    added = sums["compress"] + sums["apply"]
    device = sum(sums[key] for key in ("forward", "backward", "embed", "head")) + added
    if sums[lanes[name]] > device:
        return f"{name} takes {sums[lanes[name]]:.3g} s of {prediction.seconds:.3g} s"
    if added > prediction.seconds - device:
        return f"compressing and applying take {added:.3g} s of {prediction.seconds:.3g} s"
    return f"{name} takes {sums[lanes[name]]:.3g} s, and its last blocks are not hidden"


def _value(candidate: Candidate) -> tuple[float, ...]:
    """Sorts by what is better; impossible settings first."""
    setting, prediction = candidate.setting, candidate.prediction
    if prediction is None:
        return (-1.0, float(setting.subspace), setting.nnz, 0.0)
    elements = prediction.bytes_to_host // setting.wire_bytes
    return (float(elements), float(setting.nnz), -prediction.seconds, -setting.wire_bytes)


def _what_must_give(candidates: Sequence[Candidate], hardware: Hardware, slowdown: float) -> str:
    known = [(c.setting, c.prediction) for c in candidates if c.prediction is not None]
    if not known:
        return (
            f"None of {len(candidates)} settings is possible. The last: "
            + (candidates[-1].reasons[0])
        )
    lines = [f"None of {len(candidates)} settings keeps all limits. One of these must give:"]
    for number, where in enumerate(("device", "host")):
        setting, least = min(known, key=lambda k: _memory(k[1], hardware)[number][1])
        _, needed, limit = _memory(least, hardware)[number]
        if limit is not None and needed > limit:
            held = least.device if where == "device" else least.host
            parts = ", ".join(f"{name} {_giga(n)}" for name, n in held.items() if n > 0.01 * needed)
            lines.append(
                f"the memory of the {where}, {_giga(limit)}: {setting} needs least, "
                f"{_giga(needed)} ({parts})."
            )
    roomy = [
        (setting, prediction)
        for setting, prediction in known
        if all(limit is None or n <= limit for _, n, limit in _memory(prediction, hardware))
    ]
    among = "of those that the memory has room for, " if roomy else ""
    setting, fastest = min(roomy or known, key=lambda k: k[1].slowdown)
    if fastest.slowdown > slowdown:
        lines.append(
            f"the slow-down, {slowdown:.2f}: {among}{setting} is fastest with "
            f"{fastest.slowdown:.2f} x native; {_slowest(fastest)}."
        )
    elif not roomy and len(lines) == 1:
        lines.append("device and host memory can each be kept, but not by the same setting.")
    return "\n- ".join(lines)


def _giga(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
