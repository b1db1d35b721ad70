"""What ran when: one span per piece of work, on one of the four lanes."""

import dataclasses
import threading
from collections.abc import Iterable

__all__ = ["LANES", "Span", "Timeline"]

LANES = ("device", "d2h", "host", "h2d")


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one lane.

    Attributes:
      lane: `device`, `d2h`, `host` or `h2d`.
      step: the optimizer step it belongs to; an update that is applied while the next step has
        begun still carries its own step.
      block: index of the block, shallowest 0; -1 for the parameters outside the blocks.
      name: what was done, such as `forward`.
      start, end: seconds, of any one clock.
      nbytes: bytes moved over the link.

    Example:
      >>> Span("d2h", 0, 3, "download", 1.0, 1.5, 64).seconds
      0.5
    """

    lane: str
    step: int
    block: int
    name: str
    start: float
    end: float
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return self.end - self.start


class Timeline:
    """A list of spans that several threads may add to.

    Example:
      >>> timeline = Timeline()
      >>> timeline.add(Span("device", 0, 0, "forward", 0.0, 1.0))
      >>> len(timeline.spans)
      1
    """

    def __init__(self, spans: Iterable[Span] = ()):
        self._lock = threading.Lock()
        self._spans = list(spans)

    def add(self, span: Span) -> None:
        """Appends a span."""
        with self._lock:
            self._spans.append(span)

    def clear(self) -> None:
        """Forgets all spans."""
        with self._lock:
            self._spans.clear()

    def forget(self, before: int) -> None:
        """Forgets the spans of steps before a step, so that long runs can be recorded."""
        with self._lock:
            self._spans = [span for span in self._spans if span.step >= before]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans so far, by start."""
        with self._lock:
            spans = list(self._spans)
        return tuple(sorted(spans, key=lambda span: (span.start, span.end)))
