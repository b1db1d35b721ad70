"""What two readings of a counter that only rises say of the time between them."""

import dataclasses
from collections.abc import Iterable

__all__ = ["Peak", "Reading", "highest", "peak_between"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """Bytes in use, and the most that ever were.

    Attributes:
      now: bytes in use; None: not told.
      peak: the most since the counter started; None: not told.
    """

    now: int | None = None
    peak: int | None = None


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bounds on the most bytes in use during a stage; equal bounds are a measured peak.

    Attributes:
      at_least: bytes that were surely in use at one time.
      at_most: bytes that were never exceeded.
    """

    at_least: int
    at_most: int

    @property
    def exact(self) -> bool:
        """Whether the peak is known."""
        return self.at_least == self.at_most


def peak_between(before: Reading, after: Reading) -> Peak | None:
    """The peak between two readings.

    Allocators count the peak since the process started, and it never falls. If it rose, the stage
    reached exactly the new one. If it did not, the stage stayed below an earlier stage's peak, and
    only what was in use at its edges is known for sure.

    Returns:
      Bounds; None where the peak is not told.

    Example:
      >>> peak_between(Reading(10, 30), Reading(20, 50))
      Peak(at_least=50, at_most=50)
      >>> peak_between(Reading(10, 30), Reading(20, 30))
      Peak(at_least=20, at_most=30)
    """
    if before.peak is None or after.peak is None:
        return None
    if after.peak > before.peak:
        return Peak(after.peak, after.peak)
    seen = max(before.now or 0, after.now or 0)
    return Peak(min(seen, after.peak), after.peak)


def highest(peaks: Iterable[Peak | None]) -> Peak | None:
    """The peak of several stages, or of several devices, together; None: none was measured.

    Example:
      >>> highest([Peak(50, 50), None, Peak(20, 70)])
      Peak(at_least=50, at_most=70)
    """
    known = [peak for peak in peaks if peak is not None]
    if not known:
        return None
    return Peak(max(p.at_least for p in known), max(p.at_most for p in known))
