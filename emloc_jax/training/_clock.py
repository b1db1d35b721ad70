"""Step times and throughput, with compilation kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["StepClock"]


class StepClock:
    """Tells the first step of each batch shape, which compiles, from the others.

    Example:
        >>> clock = StepClock()
        >>> batch = {"tokens": np.ones((2, 4), np.int32)}
        >>> clock.record(batch, 3.0)
        {'compile_seconds': 3.0}
        >>> clock.record(batch, 0.5)
        {'seconds': 0.5, 'tokens_per_second': 16.0}
        >>> clock.seconds_per_step, clock.compile_seconds
        (0.5, 3.0)
    """

    def __init__(self):
        self._shapes: set[tuple] = set()
        self._seconds: list[float] = []
        self._tokens = 0
        self.compile_seconds = 0.0

    def record(self, batch: Mapping[str, Any], seconds: float) -> dict[str, float]:
        """Counts one step; returns what a metrics record should say of its time."""
        shape = tuple((key, np.shape(value)) for key, value in sorted(batch.items()))
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.compile_seconds += seconds
            return {"compile_seconds": seconds}
        tokens = count_tokens(batch)
        self._seconds.append(seconds)
        self._tokens += tokens
        return {"seconds": seconds, "tokens_per_second": tokens / seconds}

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the steps that did not compile; `None` if there were none."""
        return float(np.median(self._seconds)) if self._seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens (padding not counted) per second over those steps."""
        return self._tokens / sum(self._seconds) if self._seconds else None


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    if "segments" in batch:
        return int(np.count_nonzero(batch["segments"]))
    if "latents" in batch:
        return int(np.prod(batch["latents"].shape[:2]))
    return int(next(iter(batch.values())).size)
