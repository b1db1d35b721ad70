"""One optimizer step's way through the lanes: gradients down, Adam, updates up, apply."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple

import jax
import numpy as np

from emloc_jax.offload._lanes import Gate, InlineLane, Lane, ThreadLane, Work, no_delay
from emloc_jax.offload._link import Link, tree_bytes
from emloc_jax.offload._schedules import Schedule
from emloc_jax.offload._timeline import Timeline

__all__ = ["Held", "Lanes", "StepFlow"]


class Held(NamedTuple):
    """An update of a delayed schedule that has arrived and is to be applied later.

    Attributes:
      update: what has arrived, on the device.
      apply: takes it when its time has come.
    """

    update: Any
    apply: Callable[[Any], None]


class Lanes:
    """The four lanes of a device and its host.

    `device` is a witness: XLA runs the programs in the order they were dispatched, and this lane
    waits for each in turn, so that its end is known and what depends on it can start.

    Args:
      link: what `d2h` and `h2d` move arrays with.
      overlap: real threads; otherwise everything runs inline, in one order.
      timeline: gets a span per piece of work.
      delay: prolongs work.
    """

    def __init__(
        self,
        link: Link,
        *,
        overlap: bool = True,
        timeline: Timeline | None = None,
        delay: Callable[[str, int, int, str], float] = no_delay,
    ):
        kind = ThreadLane if overlap else InlineLane
        self.link = link
        self.device: Lane = kind("device", timeline, delay=delay)
        self.d2h: Lane = kind("d2h", timeline, delay=delay)
        self.host: Lane = kind("host", timeline, delay=delay)
        self.h2d: Lane = kind("h2d", timeline, delay=delay)

    def watch(self, arrays: Any, *, step: int, block: int, name: str) -> Future:
        """Waits on the device lane until `arrays` are computed; the future gets them."""
        return self.device.submit(Work(lambda: jax.block_until_ready(arrays), step, block, name))

    def witness(self, arrays: Any, *, step: int, block: int, name: str) -> None:
        """As `watch`, but for the timeline alone, so that a closed lane is no harm."""
        with contextlib.suppress(RuntimeError):
            self.watch(arrays, step=step, block=block, name=name)

    def close(self) -> None:
        """Ends all lanes after what they hold."""
        for lane in (self.device, self.d2h, self.host, self.h2d):
            lane.close()


class StepFlow:
    """The blocks of one step, from finished gradient to applied update.

    Priorities are by next use: blocks of an earlier step first, then the shallowest block. A deep
    block finds empty queues during the backward pass and so is served as it comes; what has piled
    up when the backward pass ends is served in the order the next forward pass needs it. Schedules
    that are not layer-wise serve in order of arrival.

    Args:
      lanes: the lanes.
      schedule: what waits for what.
      step: number of this step.
      clip: largest norm of all gradients of the step together, or None.
    """

    def __init__(self, lanes: Lanes, schedule: Schedule, *, step: int, clip: float | None):
        self._lanes, self._schedule, self.step, self._clip = lanes, schedule, step, clip
        self._squares: dict[int, Future] = {}
        self._done: dict[int, Future] = {}
        self._gate = Gate()
        self._held = clip is not None or not schedule.layerwise
        if not self._held:
            self._gate.open(1.0)

    def start(
        self,
        block: int,
        gradients: Any,
        *,
        on_device: Callable[[Any, float], None] | None,
        on_host: Callable[[Any, float], Any] | None,
        on_return: Callable[[Any], None],
    ) -> Future:
        """Sends the gradients of a block on their way.

        Args:
          block: its index.
          gradients: `Gradients`, dispatched but not necessarily computed.
          on_device: updates leaves that stay, given their gradients and the clipping factor.
          on_host: from gradients on the host and the factor to an update; None: none are sent.
          on_return: takes the update that has arrived on the device.

        Returns:
          A future that is done once the update is on the device and nothing of this step is left
          to do but, with a delayed schedule, what it holds: a `Held` update.
        """
        done: Future = Future()
        self._done[block] = done
        flow, lanes, step = self, self._lanes, self.step
        watched = lanes.watch(gradients, step=step, block=block, name="backward")
        # Only the number is kept: gradients must not live longer than their way takes.
        self._squares[block] = squares = Future()

        def order() -> tuple[int, ...]:
            return (step, block) if flow._schedule.layerwise else (step,)

        def then(future: Future, next_: Callable[[Any], None]) -> None:
            def follow(finished: Future) -> None:
                try:
                    next_(finished.result())
                except BaseException as error:
                    fail(squares, error)
                    fail(done, error)

            future.add_done_callback(follow)

        def computed(result: Any) -> None:
            own, sent = result.device, result.host
            # One verdict for the whole block: what is not finite is not applied anywhere.
            good = bool(np.isfinite(float(result.squares)))
            if on_device is not None:
                apply_here = on_device
                self._gate.when_open(lambda scale: apply_here(own, scale if good else np.nan))
            if on_host is None:
                self._gate.when_open(lambda scale: done.set_result(None))
            else:
                work = Work(
                    lambda: lanes.link.to_host(sent),
                    step,
                    block,
                    "download",
                    tree_bytes(sent),
                    order(),
                )
                then(lanes.d2h.submit(work), lambda host: downloaded(host, good))
            # Last, since the step may end as soon as all blocks have said this.
            squares.set_result(result.squares)

        def downloaded(host_gradients: Any, good: bool) -> None:
            assert on_host is not None
            adam = on_host

            def submit(scale: float) -> None:
                factor = scale if good else np.nan
                run = Work(lambda: adam(host_gradients, factor), step, block, "adam", 0, order())
                then(lanes.host.submit(run), updated)

            self._gate.when_open(submit)

        def updated(update: Any) -> None:
            work = Work(
                lambda: lanes.link.to_device(update),
                step,
                block,
                "upload",
                tree_bytes(update),
                order(),
            )
            then(lanes.h2d.submit(work), arrived)

        def arrived(update: Any) -> None:
            if self._schedule.delayed:
                done.set_result(Held(update, on_return))
                return
            on_return(update)
            done.set_result(None)

        then(watched, computed)
        return done

    def computed(self, block: int) -> Future:
        """Done once the gradients of a block that was started are computed."""
        return self._squares[block]

    def abort(self, error: BaseException) -> None:
        """Fails every block of the step that is not through, so that nobody waits for it."""
        for future in (*self._squares.values(), *self._done.values()):
            fail(future, error)

    def finish_backward(self) -> float:
        """Waits for the end of the backward pass, and lets go what waited for it.

        Returns:
          The norm of all gradients of the step together, before clipping: summed in fp64 over
          blocks in a fixed order, so that it does not depend on when they finished.
        """
        squares = {block: float(future.result()) for block, future in self._squares.items()}
        total = sum(squares[block] for block in sorted(squares))
        norm = float(np.sqrt(total))
        if self._held:
            scale = 1.0
            if self._clip is not None:
                scale = np.nan if not np.isfinite(norm) else min(1.0, self._clip / max(norm, 1e-38))
            self._gate.open(float(scale))
        return norm


def fail(future: Future, error: BaseException) -> None:
    """Sets the error, unless the future is done already."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
