import json
import sys
import threading

import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError, OutputExistsError
from emloc_jax.offload._timeline import LANES, Span, Timeline
from emloc_jax.offload._timeline_figure import draw_timeline
from emloc_jax.offload._timeline_summary import PathPart, summarize
from emloc_jax.offload._timeline_trace import trace_events, write_trace


def two_steps():
    """One block, two steps: the second step waits for the chain of the first."""
    return Timeline(
        [
            Span("device", 0, 0, "forward", 10.0, 11.0),
            Span("device", 0, 0, "backward", 11.0, 13.0),
            Span("d2h", 0, 0, "download", 13.0, 14.0, 8),
            Span("host", 0, 0, "adam", 14.5, 15.0),
            Span("h2d", 0, 0, "upload", 15.0, 17.0, 4),
            Span("device", 0, 0, "apply", 17.0, 17.5),
            Span("device", 1, 0, "forward", 17.5, 18.5),
            Span("device", 1, 0, "backward", 18.5, 20.5),
            Span("d2h", 1, 0, "download", 19.5, 21.5, 8),
        ]
    )


def test_critical_path_walks_back_through_the_chain():
    first, last = summarize(two_steps()).steps
    assert first.critical_path == (
        PathPart("device", 0, "forward", 1.0),
        PathPart("device", 0, "backward", 2.0),
        PathPart("d2h", 0, "download", 1.0),
        PathPart("idle", -1, "idle", 0.5),
        PathPart("host", 0, "adam", 0.5),
        PathPart("h2d", 0, "upload", 2.0),
        PathPart("device", 0, "apply", 0.5),
    )
    assert first.critical == {"device": 3.5, "d2h": 1.0, "host": 0.5, "h2d": 2.0, "idle": 0.5}
    # The download of the last step began during the backward pass: what ended before it counts.
    assert [part.name for part in last.critical_path] == ["forward", "idle", "download"]


def test_step_figures():
    summary = summarize(two_steps())
    first, last = summary.steps
    assert (first.seconds, last.seconds) == (7.5, 4.0)
    assert first.busy == {"device": 3.5, "d2h": 1.0, "host": 0.5, "h2d": 2.0}
    assert first.overlap == 0.0
    assert last.overlap == 0.5  # one of two seconds of download lies under the backward pass
    assert (first.bytes_to_host, first.bytes_to_device) == (8, 4)
    assert summary.mean.seconds == 5.75
    assert summary.rows()[-1]["step"] == "mean"


def test_updates_left_over_from_before_the_recording_are_no_step():
    """Of a delayed schedule: they come in the middle of the first step that was recorded."""
    timeline = two_steps()
    timeline.add(Span("device", -1, 0, "apply", 12.0, 12.5))
    summary = summarize(timeline)
    assert [step.step for step in summary.steps] == [0, 1]
    assert (summary.mean.seconds, summary.mean.bytes_to_host) == (5.75, 8)
    with pytest.raises(DataError, match="no pass"):
        summarize(Timeline([Span("device", -1, 0, "apply", 12.0, 12.5)]))


def test_mean_leaves_out_the_first_and_the_last_step():
    starts = [0.0, 9.0, 11.0, 13.0]
    spans = [Span("device", n, 0, "forward", t, t + 1.0) for n, t in enumerate(starts)]
    assert summarize(Timeline(spans)).mean.seconds == 2.0


def test_overlap_and_busy_time_agree_with_a_fine_grid():
    rng = np.random.default_rng(0)
    grid = np.arange(0, 4000)
    spans, on = [Span("device", 0, 0, "forward", 0.0, 1.0)], {lane: 0 * grid for lane in LANES}
    on["device"][0] = 1
    for lane in LANES:
        for start, length in zip(rng.integers(0, 3900, 30), rng.integers(0, 100, 30), strict=True):
            spans.append(Span(lane, 0, 0, "work", float(start), float(start + length)))
            on[lane][start : start + length] = 1
    end = max(span.end for span in spans)
    step = summarize(Timeline(spans)).steps[0]
    moved = [on[lane] for lane in LANES[1:]]
    assert step.seconds == end
    assert step.busy == {lane: on[lane].sum() for lane in LANES}
    hidden = sum((lane & on["device"]).sum() for lane in moved)
    np.testing.assert_allclose(step.overlap, hidden / sum(lane.sum() for lane in moved))
    np.testing.assert_allclose(sum(step.critical.values()), end)


def test_adding_from_many_threads_loses_nothing():
    timeline = Timeline()

    def add(block):
        for step in range(200):
            timeline.add(Span("host", step, block, "adam", 0.0, 1.0))

    threads = [threading.Thread(target=add, args=(block,)) for block in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.spans) == 1600
    timeline.clear()
    assert timeline.spans == ()


def test_a_timeline_without_device_work_has_no_steps():
    with pytest.raises(DataError, match="no pass on the lane 'device'"):
        summarize(Timeline([Span("host", 0, 0, "adam", 0.0, 1.0)]))


def test_trace_holds_every_span_on_the_thread_of_its_lane(tmp_path):
    timeline = two_steps()
    write_trace(timeline, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace == trace_events(timeline)
    names = {
        e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    assert list(names.values()) == ["device", "device to host", "host update", "host to device"]
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(complete) == len(timeline.spans)
    for event, span in zip(complete, timeline.spans, strict=True):
        assert (event["cat"], event["tid"]) == (span.lane, LANES.index(span.lane))
        assert event["ts"] == pytest.approx((span.start - 10.0) * 1e6)
        assert event["dur"] == pytest.approx(span.seconds * 1e6)
        assert event["args"] == {"step": span.step, "block": span.block, "bytes": span.nbytes}
    with pytest.raises(OutputExistsError):
        write_trace(timeline, tmp_path / "trace.json")


def test_trace_of_nothing_is_valid():
    assert {e["ph"] for e in trace_events(Timeline())["traceEvents"]} == {"M"}


def test_figure_is_a_png(tmp_path):
    path = tmp_path / "lanes.png"
    draw_timeline(two_steps(), path, steps=[0, 1], title="two steps")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputExistsError):
        draw_timeline(two_steps(), path)
    with pytest.raises(DataError, match="no device work of the steps"):
        draw_timeline(two_steps(), tmp_path / "none.png", steps=[7])
    assert not (tmp_path / "none.png").exists()


def test_figure_of_a_given_length(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    limits, original = [], Axes.set_xlim

    def spy(self, *args, **kwargs):
        limits.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "set_xlim", spy)
    draw_timeline(two_steps(), tmp_path / "short.png", steps=[0], seconds=5.0)
    assert (0, 5000.0) in limits  # milliseconds
    with pytest.raises(ConfigError, match="more than 0"):
        draw_timeline(two_steps(), tmp_path / "none.png", seconds=0.0)


def test_figure_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError, match="pip install"):
        draw_timeline(two_steps(), tmp_path / "lanes.png")
