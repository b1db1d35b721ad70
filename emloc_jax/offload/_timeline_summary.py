"""Figures of a timeline: time per step, busy lanes, overlap, critical path, bytes moved."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from emloc_jax.errors import DataError
from emloc_jax.offload._timeline import LANES, Span, Timeline

__all__ = ["PathPart", "StepSummary", "TimelineSummary", "summarize"]

Interval = tuple[float, float]
# Work that may come after a step's end; of a delayed schedule, in the middle of the next one.
_UPDATES = ("apply", "update")


class PathPart(NamedTuple):
    """A stretch of the critical path; lane `idle` where nothing ran."""

    lane: str
    block: int
    name: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepSummary:
    """One step, or the mean of some.

    Attributes:
      step: its number; None for a mean.
      seconds: iteration time, from the step's first work on the device to that of the next step;
        of the last step, to the end of its last span.
      busy: seconds per lane in which something ran, within that time.
      overlap: share of the transfer and host time (lanes `d2h`, `host`, `h2d`) during which the
        device computed; 1 when there was nothing to hide.
      critical_path: from the first to the last part; the seconds add up to the iteration time. Of
        a mean: that of the step nearest to it.
      critical: seconds of the critical path per lane, and `idle`.
      bytes_to_host, bytes_to_device: moved for this step, whenever that happened.
    """

    step: int | None
    seconds: float
    busy: Mapping[str, float]
    overlap: float
    critical_path: tuple[PathPart, ...]
    critical: Mapping[str, float]
    bytes_to_host: float
    bytes_to_device: float

    def row(self) -> dict[str, Any]:
        """Plain values by name, for a table or JSON; the path is left out."""
        return {
            "step": "mean" if self.step is None else self.step,
            "seconds": self.seconds,
            "overlap": self.overlap,
            "bytes_to_host": self.bytes_to_host,
            "bytes_to_device": self.bytes_to_device,
            **{f"{lane}_busy": value for lane, value in self.busy.items()},
            **{f"{lane}_critical": value for lane, value in self.critical.items()},
        }


@dataclasses.dataclass(frozen=True)
class TimelineSummary:
    """All steps of a timeline, and their mean.

    Attributes:
      steps: one entry per step, in order.
      mean: over the steps that have one before and one after them, so that neither the start nor
        the drain of the pipeline counts; over all when there is no such step.
    """

    steps: tuple[StepSummary, ...]
    mean: StepSummary

    def rows(self) -> list[dict[str, Any]]:
        """One row per step, and the mean as the last."""
        return [step.row() for step in (*self.steps, self.mean)]


def summarize(timeline: Timeline) -> TimelineSummary:
    """Figures of every step of a timeline.

    The critical path is found backwards: from the end of the iteration to the span that ended last
    before it, from the start of that span to the one that ended last before that, and so on, over
    all lanes. Where two ended together, the one of the same block comes first, then the one of the
    same lane. Time between is `idle`. A step of which the timeline has updates alone, begun before
    the recording, is none.

    Raises:
      DataError: no pass on the lane `device`, so there are no steps.

    Example:
      >>> spans = [Span("device", 0, 0, "backward", 0.0, 2.0), Span("d2h", 0, 0, "down", 1.0, 3.0)]
      >>> mean = summarize(Timeline(spans)).mean
      >>> mean.seconds, mean.overlap, dict(mean.critical)["d2h"]
      (3.0, 0.5, 2.0)
    """
    spans = timeline.spans
    begins: dict[int, float] = {}
    for span in spans:
        if span.lane == "device" and span.name not in _UPDATES:
            begins[span.step] = min(span.start, begins.get(span.step, span.start))
    if not begins:
        raise DataError(
            f"A timeline of {len(spans)} spans has no pass on the lane 'device', so it has no "
            "steps. Record at least one training step."
        )
    order = sorted(begins, key=lambda step: begins[step])
    last = max(span.end for span in spans if span.step == order[-1])
    ends = [begins[step] for step in order[1:]] + [last]
    steps = [
        _summarize_step(spans, step, (begins[step], end))
        for step, end in zip(order, ends, strict=True)
    ]
    return TimelineSummary(tuple(steps), _mean(steps[1:-1] or steps))


def _summarize_step(spans: Sequence[Span], step: int, window: Interval) -> StepSummary:
    inside = [s for s in spans if s.end > window[0] and s.start < window[1]]
    lanes = {lane: _union([_clip(s, window) for s in inside if s.lane == lane]) for lane in LANES}
    busy = {lane: _length(intervals) for lane, intervals in lanes.items()}
    moved = sum(busy[lane] for lane in LANES[1:])
    hidden = sum(_common(lanes[lane], lanes["device"]) for lane in LANES[1:])
    path = _critical_path(inside, window)
    critical = {
        lane: sum(part.seconds for part in path if part.lane == lane) for lane in (*LANES, "idle")
    }
    to_host, to_device = (
        sum(s.nbytes for s in spans if s.step == step and s.lane == lane) for lane in ("d2h", "h2d")
    )
    overlap = hidden / moved if moved > 0 else 1.0
    seconds = window[1] - window[0]
    return StepSummary(step, seconds, busy, overlap, path, critical, to_host, to_device)


def _mean(steps: Sequence[StepSummary]) -> StepSummary:
    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    def by_lane(name: str) -> dict[str, float]:
        return {
            lane: mean([getattr(s, name)[lane] for s in steps]) for lane in getattr(steps[0], name)
        }

    seconds = mean([s.seconds for s in steps])
    typical = min(steps, key=lambda s: abs(s.seconds - seconds))
    return StepSummary(
        step=None,
        seconds=seconds,
        busy=by_lane("busy"),
        overlap=mean([s.overlap for s in steps]),
        critical_path=typical.critical_path,
        critical=by_lane("critical"),
        bytes_to_host=mean([s.bytes_to_host for s in steps]),
        bytes_to_device=mean([s.bytes_to_device for s in steps]),
    )


def _critical_path(spans: Sequence[Span], window: Interval) -> tuple[PathPart, ...]:
    parts: list[PathPart] = []
    time, after = window[1], None
    # Spans without length would not bring the walk forward.
    by_end = sorted((s for s in spans if s.end > s.start), key=lambda s: s.end)
    while time > window[0]:
        while by_end and by_end[-1].end > time:
            by_end.pop()
        if not by_end:
            parts.append(PathPart("idle", -1, "idle", time - window[0]))
            break
        span = _before(by_end, after)
        if span.end < time:
            parts.append(PathPart("idle", -1, "idle", time - span.end))
        start = max(span.start, window[0])
        parts.append(PathPart(span.lane, span.block, span.name, span.end - start))
        time, after = span.start, span
    return tuple(reversed(parts))


def _before(by_end: Sequence[Span], after: Span | None) -> Span:
    """The span that ended last; among equals the one that `after` most likely waited for."""
    best = by_end[-1]
    if after is None:
        return best
    rank = (best.block == after.block, best.lane == after.lane)
    for span in reversed(by_end):
        if span.end < best.end:
            break
        own = (span.block == after.block, span.lane == after.lane)
        if own > rank:
            best, rank = span, own
    return best


def _clip(span: Span, window: Interval) -> Interval:
    return max(span.start, window[0]), min(span.end, window[1])


def _union(intervals: list[Interval]) -> list[Interval]:
    """The same instants as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _common(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Seconds that lie in both, each of them disjoint and in order."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return total
