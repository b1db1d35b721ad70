"""A timeline as a Chrome trace, for chrome://tracing and ui.perfetto.dev."""

import json
import os
from typing import Any

from emloc_jax._files import new_file
from emloc_jax.offload._timeline import LANES, Timeline

__all__ = ["trace_events", "write_trace"]

_TITLES = {
    "device": "device",
    "d2h": "device to host",
    "host": "host update",
    "h2d": "host to device",
}


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """The timeline in the Trace Event Format: complete events in microseconds, a thread per lane.

    The first span starts at 0. Step, block and bytes are arguments of each event.

    Example:
      >>> from emloc_jax.offload._timeline import Span
      >>> trace = trace_events(Timeline([Span("host", 2, 5, "adam", 1.0, 1.25)]))
      >>> trace["traceEvents"][-1]["name"], trace["traceEvents"][-1]["dur"]
      ('adam 5', 250000.0)
    """
    spans = timeline.spans
    zero = spans[0].start if spans else 0.0
    events: list[dict[str, Any]] = []
    for number, lane in enumerate(LANES):
        shared = {"ph": "M", "pid": 0, "tid": number}
        events.append({**shared, "name": "thread_name", "args": {"name": _TITLES[lane]}})
        events.append({**shared, "name": "thread_sort_index", "args": {"sort_index": number}})
    for span in spans:
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": LANES.index(span.lane),
                "cat": span.lane,
                "name": span.name if span.block < 0 else f"{span.name} {span.block}",
                "ts": (span.start - zero) * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"step": span.step, "block": span.block, "bytes": span.nbytes},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(timeline: Timeline, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes `trace_events` to a JSON file.

    Raises:
      OutputExistsError: `path` exists and `overwrite` is false.
      CheckpointError: the file cannot be written.
    """
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_text(json.dumps(trace_events(timeline)), encoding="utf-8")
