"""Lanes: each runs one kind of work, taking what is needed soonest first."""

import dataclasses
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from emloc_jax.offload._timeline import Span, Timeline

__all__ = ["Delay", "Gate", "InlineLane", "Lane", "ThreadLane", "Work", "no_delay"]

# (lane, step, block, name) to seconds that a piece of work is prolonged by: tests, simulation.
Delay = Callable[[str, int, int, str], float]


def no_delay(lane: str, step: int, block: int, name: str) -> float:
    """Nothing is slowed down."""
    del lane, step, block, name
    return 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of work for a lane.

    Attributes:
      run: does it.
      step, block, name, nbytes: what the timeline says of it.
      priority: smaller goes first; equal ones in the order they came.
    """

    run: Callable[[], Any]
    step: int
    block: int
    name: str
    nbytes: int = 0
    priority: tuple[int, ...] = ()


class Lane(Protocol):
    """Where work is handed in."""

    def submit(self, work: Work) -> Future:
        """Takes `work`; the future gets its result or its error."""
        ...

    def close(self) -> None:
        """Finishes what was handed in; nothing is taken any more."""
        ...


class _Clock:
    """Does a piece of work and tells the timeline."""

    def __init__(self, name: str, timeline: Timeline | None, delay: Delay):
        self.name, self._timeline, self._delay = name, timeline, delay

    def run(self, work: Work, future: Future) -> None:
        began = time.perf_counter()
        try:
            result = work.run()
            extra = self._delay(self.name, work.step, work.block, work.name)
            if extra > 0:
                time.sleep(extra)
        except BaseException as error:
            future.set_exception(error)
            return
        ended = time.perf_counter()
        if self._timeline is not None:
            self._timeline.add(
                Span(self.name, work.step, work.block, work.name, began, ended, work.nbytes)
            )
        future.set_result(result)


class InlineLane:
    """A lane without a thread: work is done at once by whoever hands it in.

    Example:
      >>> lane = InlineLane("host")
      >>> lane.submit(Work(lambda: 6 * 7, step=0, block=0, name="adam")).result()
      42
    """

    def __init__(self, name: str, timeline: Timeline | None = None, *, delay: Delay = no_delay):
        self._clock = _Clock(name, timeline, delay)

    def submit(self, work: Work) -> Future:
        """Does `work`."""
        future: Future = Future()
        self._clock.run(work, future)
        return future

    def close(self) -> None:
        """Nothing is left to do."""


class ThreadLane:
    """A lane with a thread of its own and a queue ordered by priority.

    An error in a piece of work goes to that work's future; the lane goes on.

    Example:
      >>> lane = ThreadLane("host")
      >>> lane.submit(Work(lambda: 6 * 7, step=0, block=0, name="adam")).result()
      42
      >>> lane.close()
    """

    def __init__(self, name: str, timeline: Timeline | None = None, *, delay: Delay = no_delay):
        self._clock = _Clock(name, timeline, delay)
        self._heap: list[tuple[tuple[int, ...], int, Work, Future]] = []
        self._arrival = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=f"emloc-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Future:
        """Queues `work`.

        Raises:
          RuntimeError: the lane is closed.
        """
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"The lane '{self._clock.name}' is closed.")
            heapq.heappush(self._heap, (work.priority, next(self._arrival), work, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Runs what is queued, then ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._heap and not self._closed:
                    self._changed.wait()
                if not self._heap:
                    return
                _, _, work, future = heapq.heappop(self._heap)
            self._clock.run(work, future)
            del work, future  # what they close over must not live on while the lane waits


class Gate:
    """Holds work back until it is opened with a value; afterwards work runs at once.

    Example:
      >>> gate, seen = Gate(), []
      >>> gate.when_open(seen.append)
      >>> gate.open(0.5)
      >>> gate.when_open(seen.append)
      >>> seen
      [0.5, 0.5]
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._waiting: list[Callable[[Any], None]] = []
        self._value: Any = None
        self._opened = False

    def when_open(self, run: Callable[[Any], None]) -> None:
        """Calls `run(value)` now if the gate is open, else when it opens."""
        with self._lock:
            if not self._opened:
                self._waiting.append(run)
                return
        run(self._value)

    def open(self, value: Any) -> None:
        """Opens the gate, running what waits in the order it came."""
        with self._lock:
            self._value, self._opened = value, True
            waiting, self._waiting = self._waiting, []
        for run in waiting:
            run(value)
