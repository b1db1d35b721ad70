import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.offload._gradients import Gradients
from emloc_jax.offload._lane_times import LaneTimes, closed_form, transition_block
from emloc_jax.offload._link import DevicePutLink
from emloc_jax.offload._measured_times import measured_times
from emloc_jax.offload._schedules import schedule_named
from emloc_jax.offload._simulate import POLICIES, simulate, simulated_seconds
from emloc_jax.offload._step_flow import Lanes, StepFlow
from emloc_jax.offload._timeline import Span, Timeline
from emloc_jax.offload._timeline_summary import summarize

LLAMA = LaneTimes(32, forward=12.2, backward=28.1, d2h=20.0, host=39.0, h2d=20.0)


def random_times(rng, blocks=None, *, device=True, uniform=True):
    blocks = int(rng.integers(8, 33)) if blocks is None else blocks
    size = None if uniform else blocks
    forward = rng.uniform(0.5, 1.5, size)
    backward = forward * rng.uniform(1.5, 3.0, size)
    lanes = [rng.uniform(0.05, 1.2, size) * (forward + backward) for _ in range(3)]
    extra = rng.uniform(0, 0.1, 2) if device else (0.0, 0.0)
    names = ("d2h", "host", "h2d", "compress", "apply")
    return LaneTimes(blocks, forward, backward, **dict(zip(names, (*lanes, *extra), strict=True)))


def spans_of(timeline, lane, name):
    return {(s.step, s.block): s for s in timeline.spans if (s.lane, s.name) == (lane, name)}


def test_published_example():
    assert round(closed_form(LLAMA, "lsp")) == 1369
    assert round(simulated_seconds(LLAMA, "fcfs"), 1) == 1706.5
    assert round(simulated_seconds(LLAMA, "switch")) == 1572
    assert round(simulated_seconds(LLAMA, "lsp")) == 1399
    assert simulated_seconds(LLAMA, "layerwise") == simulated_seconds(LLAMA, "lsp")
    np.testing.assert_allclose(transition_block(LLAMA), 32 - (32 * 28.1 - 79) / 39)


def test_bound_is_never_beaten_and_next_use_never_loses():
    rng = np.random.default_rng(0)
    for _ in range(100):
        times = random_times(rng)
        bound = closed_form(times, "lsp")
        lsp, fcfs, switch = (
            simulated_seconds(times, policy, steps=4) for policy in ("lsp", "fcfs", "switch")
        )
        assert min(lsp, fcfs, switch) >= bound * (1 - 1e-9)
        assert lsp <= min(fcfs, switch) * (1 + 1e-9)


def test_fast_lanes_leave_only_the_chain_of_the_first_block():
    times = LaneTimes(9, 1.0, 2.0, d2h=0.3, host=0.5, h2d=0.2, head=0.7)
    for policy in ("lsp", "fcfs", "switch"):
        np.testing.assert_allclose(simulated_seconds(times, policy), 27.7 + 1.0)


def chain(start, ready, seconds):
    """Ends of work that is done in the order it becomes ready, one at a time."""
    ends = []
    for begin, length in zip(ready, seconds, strict=True):
        start = max(start, begin) + length
        ends.append(start)
    return ends


@pytest.mark.parametrize("policy", ["fcfs", "offload"])
def test_orders_of_arrival_agree_with_recurrences(policy):
    """First come, first served means deep to shallow in every lane: plain max-plus recurrences."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        times = random_times(rng, 7, device=False, uniform=False)
        arrived, starts = np.zeros(7), []
        time = 0.0
        for _ in range(6):
            first = True
            for block in range(7):
                wait = arrived.max() if policy == "offload" else arrived[block]
                time = max(time, wait)
                if first:
                    starts.append(time)
                first = False
                time += times.forward[block]
            down = slice(None, None, -1)
            passed = time + np.cumsum(times.backward[down])
            time = passed[-1]
            ready = chain(0.0, passed, times.d2h[down])
            if policy == "offload":
                ready = np.maximum(ready, time)
            ready = chain(0.0, ready, times.host[down])
            arrived = np.array(chain(0.0, ready, times.h2d[down]))[::-1]
        expected = (starts[-1] - starts[2]) / 3
        np.testing.assert_allclose(simulated_seconds(times, policy, steps=6), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_span_waits_for_what_it_needs(policy):
    rng = np.random.default_rng(2)
    times = random_times(rng, 6, uniform=False)
    timeline = simulate(times, policy, steps=5, micro_batches=2)
    for lane in ("device", "d2h", "host", "h2d"):
        own = [s for s in timeline.spans if s.lane == lane]
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    if policy == "native":
        assert {s.lane for s in timeline.spans} == {"device"}
        return
    stages = [("device", "backward"), ("d2h", "download"), ("host", "adam"), ("h2d", "upload")]
    stages.append(("device", "apply"))
    for before, after in itertools.pairwise(stages):
        left, right = spans_of(timeline, *before), spans_of(timeline, *after)
        assert set(left) == set(right) and len(left) == 30
        assert all(left[key].end <= right[key].start for key in left)
    applied = spans_of(timeline, "device", "apply")
    backward = spans_of(timeline, "device", "backward")
    delay = int(policy == "offload_delayed")
    for span in timeline.spans:
        due = span.step - 1 - delay
        if span.name == "forward" and due >= 0:
            assert applied[due, span.block].end <= span.start
        if span.name == "adam" and policy in ("offload", "lsp_serial", "offload_delayed"):
            assert span.start >= max(backward[span.step, block].end for block in range(6))
    if delay:
        for (step, block), span in applied.items():
            if step < 4:
                assert span.start >= backward[step + 1, block].end
    elif policy in ("offload", "lsp_serial"):
        for step in range(4):
            begin = min(s.start for s in timeline.spans if s.step == step + 1)
            assert max(applied[step, block].end for block in range(6)) <= begin


@pytest.mark.parametrize("policy", ["lsp", "offload"])
def test_lanes_never_idle_while_work_is_ready_and_keep_the_order(policy):
    times = random_times(np.random.default_rng(3), 12)
    timeline = simulate(times, policy, steps=4)
    before = {"d2h": ("device", "backward"), "host": ("d2h", "download"), "h2d": ("host", "adam")}
    names = {"d2h": "download", "host": "adam", "h2d": "upload"}
    passed = spans_of(timeline, "device", "backward")
    for lane, stage in before.items():
        ready = {key: span.end for key, span in spans_of(timeline, *stage).items()}
        if lane == "host" and policy == "offload":
            ready = {key: max(end, passed[key[0], 0].end) for key, end in ready.items()}
        work = spans_of(timeline, lane, names[lane])
        end = 0.0
        for key, span in sorted(work.items(), key=lambda item: item[1].start):
            waiting = [k for k in work if ready[k] < span.start <= work[k].start]
            if lane == "host" and policy == "offload":
                assert all(k >= key or k[0] == key[0] for k in waiting)
            elif policy == "offload":
                assert all(ready[key] <= ready[k] for k in waiting)
            else:
                assert all(key <= k for k in waiting)
            # Work conservation: it starts as soon as it is ready and the lane is free.
            assert span.start == max(end, min([ready[key], *(ready[k] for k in waiting)]))
            end = span.end


def test_native_and_closed_forms_of_the_serial_schedules():
    rng = np.random.default_rng(4)
    for _ in range(20):
        times = random_times(rng)
        np.testing.assert_allclose(simulated_seconds(times, "native"), closed_form(times, "native"))
        # The formula assumes perfectly filled lanes, and a host that waits for all downloads.
        rest = sum(float(getattr(times, name).max()) for name in ("d2h", "host", "h2d", "apply"))
        formula, seconds = closed_form(times, "offload"), simulated_seconds(times, "offload")
        assert seconds <= formula + rest + 1e-9
        if times.total["d2h"] <= times.total["backward"]:
            assert seconds >= formula - 1e-9
        assert simulated_seconds(times, "lsp_serial") == seconds


def test_delayed_update_hides_the_host_until_a_lane_is_full():
    quick = LaneTimes(10, 1.0, 2.0, d2h=0.5, host=2.9, h2d=0.5)
    np.testing.assert_allclose(simulated_seconds(quick, "offload_delayed"), 30.0)
    slow = LaneTimes(10, 1.0, 2.0, d2h=0.5, host=6.0, h2d=0.5)
    np.testing.assert_allclose(
        simulated_seconds(slow, "offload_delayed", steps=20), 60.0, rtol=0.01
    )
    wire = LaneTimes(10, 1.0, 2.0, d2h=4.0, host=0.5, h2d=4.0)
    shared = simulated_seconds(wire, "offload_delayed", shared_link=True, steps=20)
    assert closed_form(wire, "offload_delayed") == 80.0
    np.testing.assert_allclose(shared, 80.0, rtol=0.01)
    assert simulated_seconds(wire, "offload_delayed", steps=20) < 0.7 * shared


def test_micro_batches_add_passes_and_no_transfers():
    times = LaneTimes(5, 1.0, 2.0, d2h=0.1, host=0.1, h2d=0.1)
    timeline = simulate(times, "lsp", steps=3, micro_batches=4, nbytes=7)
    assert len([s for s in timeline.spans if s.name == "forward"]) == 60
    summary = summarize(timeline)
    assert summary.mean.bytes_to_host == summary.mean.bytes_to_device == 35
    np.testing.assert_allclose(summary.mean.seconds, 60.3)
    np.testing.assert_allclose(closed_form(times, "lsp", micro_batches=4), 60.3)


def test_clipping_holds_the_host_back():
    times = LaneTimes(8, 1.0, 2.0, d2h=0.2, host=1.0, h2d=0.2)
    free, held = (simulate(times, "lsp", steps=3, clip=clip) for clip in (False, True))
    end = spans_of(held, "device", "backward")[0, 0].end
    assert min(s.start for s in held.spans if s.lane == "host") == end
    assert min(s.start for s in free.spans if s.lane == "host") < end
    assert simulated_seconds(times, "lsp", clip=True) > simulated_seconds(times, "lsp")


def test_a_simulated_timeline_can_be_summarized():
    mean = summarize(simulate(LLAMA, "lsp")).mean
    np.testing.assert_allclose(mean.seconds, simulated_seconds(LLAMA, "lsp"))
    np.testing.assert_allclose(sum(mean.critical.values()), mean.seconds)
    np.testing.assert_allclose(mean.busy["host"], 32 * 39.0)
    assert 0.9 < mean.overlap < 1


def test_times_can_be_read_from_a_timeline():
    times = random_times(np.random.default_rng(5), 6, uniform=False)
    again = measured_times(simulate(times, "lsp", steps=3))
    for name in ("forward", "d2h", "host", "h2d", "apply"):
        np.testing.assert_allclose(getattr(again, name), getattr(times, name))
    np.testing.assert_allclose(again.backward, times.backward + times.compress)
    with pytest.raises(DataError, match="0 spans"):
        measured_times(Timeline())
    spans = [Span("device", 0, 0, "forward", 0.0, 1.0), Span("device", 0, 0, "backward", 1.0, 3.0)]
    outer = [Span("d2h", 0, -1, "download", 3.0, 3.5), Span("device", 0, 1, "head", 3.0, 3.25)]
    times = measured_times(Timeline(spans + outer))
    assert (times.blocks, times.d2h.tolist(), times.head) == (2, [0.5, 0.0], 0.25)


def test_lanes_without_work_cost_nothing():
    times = LaneTimes(3, 1.0, 2.0)
    timeline = simulate(times, "lsp", steps=2)
    names = {"forward", "backward", "download", "adam", "upload", "apply"}
    assert {s.name for s in timeline.spans} == names
    assert simulated_seconds(times, "lsp") == simulated_seconds(times, "native") == 9.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 0}, "at least 1"),
        ({"forward": [1.0, 2.0]}, "shape"),
        ({"host": -1.0}, "negative"),
        ({"d2h": float("nan")}, "not finite"),
        ({"head": -1.0}, "`head`"),
    ],
)
def test_impossible_times_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LaneTimes(**({"blocks": 3, "forward": 1.0, "backward": 2.0} | arguments))


def test_unknown_schedules_are_refused():
    for call in (simulate, closed_form):
        with pytest.raises(ConfigError, match="'lifo'"):
            call(LLAMA, "lifo")
    with pytest.raises(ConfigError, match="at least 1"):
        simulate(LLAMA, "lsp", steps=0)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["lsp", "offload"])
def test_real_lanes_take_the_simulated_time(schedule):
    """Threads that sleep as long as the work would take, in the trainer's own lanes."""
    times = LaneTimes(6, 0.020, 0.040, d2h=0.030, host=0.056, h2d=0.024, apply=0.004)
    names = {"download": "d2h", "adam": "host", "upload": "h2d"}
    timeline = Timeline()

    def delay(lane, step, block, name):
        return float(getattr(times, names.get(name, name))[block])

    lanes = Lanes(DevicePutLink(), timeline=timeline, delay=delay)
    token, pending = jnp.zeros(2), {}
    for step in range(6):
        flow = StepFlow(lanes, schedule_named(schedule), step=step, clip=None)
        if schedule == "offload":
            for block in list(pending):
                pending.pop(block).result()
        for block in range(6):
            if block in pending:
                pending.pop(block).result()
            lanes.watch(token, step=step, block=block, name="forward")
        for block in reversed(range(6)):

            def on_return(update, step=step, block=block):
                lanes.watch(update, step=step, block=block, name="apply")

            pending[block] = flow.start(
                block,
                Gradients({"kernel": token}, {}, jnp.float32(0)),
                on_device=None,
                on_host=lambda gradients, scale: gradients,
                on_return=on_return,
            )
        flow.finish_backward()
    for future in pending.values():
        future.result()
    lanes.close()
    measured = summarize(timeline).mean.seconds
    # A sleep lasts longer than asked for, so that the lane times too are those that were measured.
    predicted = simulated_seconds(measured_times(timeline), schedule)
    np.testing.assert_allclose(measured, predicted, rtol=0.1)
