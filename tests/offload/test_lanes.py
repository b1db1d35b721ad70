"""Lanes, gates and links by themselves."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError
from emloc_jax.offload import DevicePutLink, PinnedHostLink, SimulatedLink, Timeline
from emloc_jax.offload._lanes import Gate, InlineLane, ThreadLane, Work


def test_the_smallest_priority_goes_first_and_equals_keep_their_order():
    lane, started, go, order = ThreadLane("host"), threading.Event(), threading.Event(), []

    def hold():
        started.set()
        go.wait()

    lane.submit(Work(hold, 0, 0, "hold"))
    started.wait()  # from here on everything queues up
    for block, priority in [(5, (1, 5)), (2, (1, 2)), (9, (0, 9)), (3, (1, 2))]:
        lane.submit(Work(lambda b=block: order.append(b), 0, block, "x", priority=priority))
    go.set()
    lane.close()
    assert order == [9, 2, 3, 5]


@pytest.mark.parametrize("kind", [ThreadLane, InlineLane])
def test_an_error_goes_to_its_future_and_the_lane_goes_on(kind):
    timeline = Timeline()
    lane = kind("d2h", timeline)
    bad = lane.submit(Work(lambda: 1 / 0, 0, 0, "bad"))
    good = lane.submit(Work(lambda: "done", 3, 1, "good", nbytes=7))
    assert good.result(timeout=10) == "done"
    with pytest.raises(ZeroDivisionError):
        bad.result(timeout=10)
    lane.close()
    (span,) = timeline.spans
    assert (span.lane, span.step, span.block, span.name, span.nbytes) == ("d2h", 3, 1, "good", 7)


def test_a_closed_lane_finishes_its_queue_and_takes_no_more():
    lane, done = ThreadLane("host"), []
    for number in range(5):
        lane.submit(Work(lambda n=number: done.append(n), 0, 0, "x"))
    lane.close()
    assert done == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="closed"):
        lane.submit(Work(lambda: None, 0, 0, "x"))


def test_a_delay_is_part_of_the_work():
    lane = ThreadLane("h2d", delay=lambda lane, step, block, name: 0.05 * block)
    began = time.perf_counter()
    lane.submit(Work(lambda: None, 0, 2, "x")).result()
    assert time.perf_counter() - began >= 0.1
    lane.close()


def test_a_gate_lets_everything_through_once_opened():
    gate, seen = Gate(), []
    gate.when_open(lambda v: seen.append(("early", v)))
    assert seen == []
    gate.open(0.25)
    gate.when_open(lambda v: seen.append(("late", v)))
    assert seen == [("early", 0.25), ("late", 0.25)]


@pytest.mark.parametrize("make", [DevicePutLink, PinnedHostLink, lambda: SimulatedLink(1e9)])
def test_links_move_trees_unchanged(make):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}
    link = make()
    host = link.to_host(tree)
    back = link.to_device(host)
    for name, array in tree.items():
        np.testing.assert_array_equal(np.asarray(host[name]), np.asarray(array))
        np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(array))
        assert back[name].dtype == array.dtype
        assert back[name].sharding.memory_kind == array.sharding.memory_kind


def test_a_simulated_link_takes_its_time():
    link = SimulatedLink(1e6, latency=0.02)
    array = {"a": jnp.zeros(10_000, jnp.float32)}  # 40 kB: 40 ms
    link.to_host(array)
    began = time.perf_counter()
    link.to_host(array)
    assert 0.06 <= time.perf_counter() - began < 1


@pytest.mark.parametrize(("bandwidth", "latency"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -1)])
def test_an_impossible_link_is_refused(bandwidth, latency):
    with pytest.raises(ConfigError, match="positive"):
        SimulatedLink(bandwidth, latency=latency)
