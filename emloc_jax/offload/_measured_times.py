"""Lane times as a timeline shows them, to simulate what was measured."""

import numpy as np

from emloc_jax.errors import DataError
from emloc_jax.offload._lane_times import LaneTimes
from emloc_jax.offload._timeline import Timeline

__all__ = ["measured_times"]

# Name of a span to name of a lane time; a backward span includes the compression.
_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "download": "d2h",
    "adam": "host",
    "upload": "h2d",
    "apply": "apply",
    "update": "update",
}


def measured_times(timeline: Timeline) -> LaneTimes:
    """Mean seconds per block and lane of a recorded run, its first step left out if it has others.

    What the parameters outside the blocks (block -1) sent and got becomes a block of its own in
    front of the others.

    Raises:
      DataError: no forward and backward pass of a block was recorded.

    Example:
      >>> from emloc_jax.offload._simulate import simulate
      >>> times = LaneTimes(2, forward=1.0, backward=2.0, d2h=0.5, host=0.25, head=0.125)
      >>> again = measured_times(simulate(times, "lsp", steps=3))
      >>> again.backward.tolist(), again.host.tolist(), again.head
      ([2.0, 2.0], [0.25, 0.25], 0.125)
    """
    spans = timeline.spans
    first = min((s.step for s in spans), default=0)
    if any(s.step > first for s in spans):
        spans = tuple(s for s in spans if s.step > first)
    seconds: dict[tuple[str, int], list[float]] = {}
    for span in spans:
        block = -1 if span.name in ("embed", "head") else span.block
        seconds.setdefault((span.name, block), []).append(span.seconds)
    blocks = sorted({block for name, block in seconds if name in _NAMES})
    if (
        not any(name == "forward" for name, _ in seconds)
        or ("backward", max(blocks)) not in seconds
    ):
        raise DataError(
            f"A timeline of {len(timeline.spans)} spans shows no forward and backward pass of "
            "blocks, so there are no times to take from it. Record at least one training step."
        )

    def mean(name: str, block: int) -> float:
        return float(np.mean(seconds.get((name, block), [0.0])))

    times = {ours: [mean(name, b) for b in blocks] for name, ours in _NAMES.items()}
    return LaneTimes(len(blocks), **times, embed=mean("embed", -1), head=mean("head", -1))
