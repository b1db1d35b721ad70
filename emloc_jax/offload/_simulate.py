"""The four lanes as an event-driven simulation, for every schedule and for comparison queues."""

import dataclasses
import heapq
from typing import Any, Literal, NamedTuple

import numpy as np

from emloc_jax.errors import ConfigError
from emloc_jax.offload._lane_times import LaneTimes, transition_block
from emloc_jax.offload._schedules import SCHEDULES
from emloc_jax.offload._timeline import Span, Timeline

__all__ = ["POLICIES", "simulate", "simulated_seconds", "steady_seconds"]

# What a lane does, by its name.
_WORK = {"d2h": "download", "host": "adam", "h2d": "upload"}


@dataclasses.dataclass(frozen=True)
class _Policy:
    """How the lanes choose and wait.

    Attributes:
      order: which ready item a lane takes first.
      host: updates cross the link; otherwise Adam runs on the device after the backward pass.
      barrier: no host update before the end of its step's last backward pass.
      wait_all: a step begins when all updates are applied, not block by block.
      delay: steps by which updates are late.
    """

    order: Literal["arrival", "next_use", "switch"] = "next_use"
    host: bool = True
    barrier: bool = False
    wait_all: bool = False
    delay: int = 0


def _policy(name: str) -> _Policy:
    if name in ("fcfs", "switch"):
        return _Policy("arrival" if name == "fcfs" else "switch")
    if name not in SCHEDULES:
        raise ConfigError(f"The schedule '{name}' is unknown; there are {', '.join(POLICIES)}.")
    schedule = SCHEDULES[name]
    if not schedule.host:
        return _Policy(host=False)
    if schedule.layerwise:
        return _Policy()
    return _Policy("arrival", barrier=True, wait_all=True, delay=int(schedule.delayed))


POLICIES = (*SCHEDULES, "fcfs", "switch")


def simulate(
    times: LaneTimes,
    schedule: str,
    *,
    steps: int = 8,
    micro_batches: int = 1,
    clip: bool = False,
    shared_link: bool = False,
    nbytes: int | np.ndarray = 0,
) -> Timeline:
    """Plays `steps` optimizer steps through the lanes.

    There is one worker per lane and nothing is interrupted. The device runs the backward passes
    from the deepest block to the shallowest, then the next step's forward passes; when its next
    pass must wait, it applies the updates that have arrived. The forward pass of a block waits for
    the block's update of the step before (of two steps before, if delayed).

    Args:
      times: work per block.
      schedule: one of `POLICIES`. `layerwise` and `lsp` take the item that is used soonest, and
        differ from each other in their times only; `fcfs` takes the item that came first, and
        `switch` turns from that to last-come-first-served at `transition_block`. `offload`,
        `lsp_serial` and `offload_delayed` update after the backward pass, in order of arrival, and
        a step begins when all updates due are applied. A delayed update is not applied before the
        block's next backward pass, so that both passes see the same kernels.
      steps: how many; the first two are needed to fill the lanes.
      micro_batches: passes per step; only the last one's gradients go down.
      clip: global-norm clipping: no host update starts before the end of the backward pass.
      shared_link: downloads and uploads exclude each other.
      nbytes: per block, each way; only noted in the spans.

    Returns:
      The spans of all steps with the first at 0, the drain at the end included.

    Raises:
      ConfigError: an unknown schedule, or fewer than one step or micro-batch.

    Example:
      >>> times = LaneTimes(2, forward=1.0, backward=2.0, d2h=1.0, host=1.0, h2d=1.0)
      >>> [(s.lane, s.block, s.start) for s in simulate(times, "lsp", steps=1).spans][-3:]
      [('host', 0, 7.0), ('h2d', 0, 8.0), ('device', 0, 9.0)]
    """
    if steps < 1 or micro_batches < 1:
        raise ConfigError(
            f"A simulation of {steps} steps with {micro_batches} micro-batches was asked for; "
            "both must be at least 1."
        )
    policy = _policy(schedule)
    if clip and policy.host:
        policy = dataclasses.replace(policy, barrier=True)
    sizes = np.broadcast_to(np.asarray(nbytes, np.int64), (times.blocks,))
    return _Machine(times, policy, steps, micro_batches, shared_link, sizes).run()


def simulated_seconds(times: LaneTimes, schedule: str, *, steps: int = 8, **options: Any) -> float:
    """Iteration time in the steady state, from `simulate` with the same arguments.

    Example:
      >>> times = LaneTimes(32, forward=12.2, backward=28.1, d2h=20.0, host=39.0, h2d=20.0)
      >>> round(simulated_seconds(times, "fcfs")), round(simulated_seconds(times, "lsp"))
      (1707, 1399)
    """
    return steady_seconds(simulate(times, schedule, steps=max(steps, 4), **options))


def steady_seconds(timeline: Timeline) -> float:
    """Time per step of a simulated timeline of at least 4 steps, the first two left out."""
    begins: dict[int, float] = {}
    for span in timeline.spans:
        if span.lane == "device":
            begins.setdefault(span.step, span.start)
    first, last = 2, max(begins)
    return (begins[last] - begins[first]) / (last - first)


class _Pass(NamedTuple):
    """One entry of the device's programme."""

    step: int
    block: int
    name: str
    seconds: float
    # Of the block's last backward pass in the step: its gradient is complete.
    last: bool = False


class _Machine:
    """State of one simulation."""

    def __init__(self, times, policy, steps, micro_batches, shared_link, sizes):
        self.times, self.policy = times, policy
        self.shared_link, self.sizes = shared_link, sizes
        self.transition = transition_block(times)
        self.programme = _programme(times, steps, micro_batches, policy)
        self.position, self.last_step = 0, steps - 1
        self.queues: dict[str, list[Any]] = {"device": [], "d2h": [], "host": [], "h2d": []}
        self.busy: set[str] = set()
        self.events: list[Any] = []
        self.arrivals = 0
        self.now = 0.0
        # Last step whose gradient is done, whose update is applied; by block.
        self.passed, self.applied = [-1] * times.blocks, [-1] * times.blocks
        self.held: list[
            tuple[int, int]
        ] = []  # downloads that wait for the end of the backward pass
        self.early: set[tuple[int, int]] = set()  # uploads that the kernels are not free for yet
        self.timeline = Timeline()

    def run(self) -> Timeline:
        self._start_work()
        while self.events:
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now:
                _, _, lane, item = heapq.heappop(self.events)
                self.busy.discard(lane)
                self._finish(lane, item)
            self._start_work()
        return self.timeline

    def _start_work(self) -> None:
        if "device" not in self.busy:
            self._start_device()
        for lane, other in (("d2h", "h2d"), ("host", "host"), ("h2d", "d2h")):
            blocked = self.shared_link and other in self.busy
            if lane not in self.busy and not blocked and self.queues[lane]:
                _, step, block = heapq.heappop(self.queues[lane])
                seconds = float(getattr(self.times, lane)[block])
                self._start(lane, _Pass(step, block, _WORK[lane], seconds))

    def _start_device(self) -> None:
        if self.position < len(self.programme) and self._may_run(self.programme[self.position]):
            self.position += 1
            self._start("device", self.programme[self.position - 1])
        elif self.queues["device"]:
            _, step, block = heapq.heappop(self.queues["device"])
            self._start("device", _Pass(step, block, "apply", float(self.times.apply[block])))

    def _may_run(self, work: _Pass) -> bool:
        if not self.policy.host:
            return True
        due = work.step - 1 - self.policy.delay
        if self.policy.wait_all:
            return work.name not in ("embed", "forward") or min(self.applied) >= due
        return work.name != "forward" or self.applied[work.block] >= due

    def _start(self, lane: str, work: _Pass) -> None:
        end = self.now + work.seconds
        if work.seconds > 0 or work.name not in ("embed", "head", "update"):
            nbytes = int(self.sizes[work.block]) if lane in ("d2h", "h2d") else 0
            step, block, name, _, _ = work
            self.timeline.add(Span(lane, step, block, name, self.now, end, nbytes))
        self.busy.add(lane)
        self.arrivals += 1
        heapq.heappush(self.events, (end, self.arrivals, lane, work))

    def _finish(self, lane: str, work: _Pass) -> None:
        step, block = work.step, work.block
        if lane == "d2h":
            self._downloaded(step, block)
        elif lane == "host":
            self._queue("h2d", step, block)
        elif lane == "h2d":
            self._uploaded(step, block)
        elif work.name == "apply":
            self.applied[block] = step
        elif work.last:
            self.passed[block] = step
            self._queue("d2h", step, block)
            if (step - self.policy.delay, block) in self.early:
                self._uploaded(step - self.policy.delay, block)
            if block == 0:
                for waiting in self.held:
                    self._queue("host", *waiting)
                self.held.clear()

    def _downloaded(self, step: int, block: int) -> None:
        if self.policy.barrier and self.passed[0] < step:
            self.held.append((step, block))
        else:
            self._queue("host", step, block)

    def _uploaded(self, step: int, block: int) -> None:
        # After the last step nothing uses the old kernels any more.
        if self.passed[block] >= min(step + self.policy.delay, self.last_step):
            self._queue("device", step, block)
        else:
            self.early.add((step, block))

    def _queue(self, lane: str, step: int, block: int) -> None:
        self.arrivals += 1
        order = self.policy.order
        if order == "next_use":
            key = (step, block, 0)
        elif order == "switch" and block < self.transition:
            key = (step, 0, block)  # the last to come are the shallowest
        else:
            key = (step, 1, self.arrivals)
        heapq.heappush(self.queues[lane], (key, step, block))


def _programme(times: LaneTimes, steps: int, micro_batches: int, policy: _Policy) -> list[_Pass]:
    """What the device computes, in order; the applying of updates finds its own place."""
    up, down = range(times.blocks), range(times.blocks - 1, -1, -1)
    names = ("forward", "backward", "compress", "update")
    forward, backward, compress, update = (getattr(times, name).tolist() for name in names)
    if policy.host:
        backward = [sum(pair) for pair in zip(backward, compress, strict=True)]
    passes = []
    for step in range(steps):
        for micro in range(micro_batches):
            last = policy.host and micro == micro_batches - 1
            passes.append(_Pass(step, -1, "embed", times.embed))
            passes += [_Pass(step, block, "forward", forward[block]) for block in up]
            passes.append(_Pass(step, -1, "head", times.head))
            passes += [_Pass(step, block, "backward", backward[block], last) for block in down]
        if not policy.host:
            passes += [_Pass(step, block, "update", update[block]) for block in down]
    return passes
