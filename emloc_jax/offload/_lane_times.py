"""How long each block keeps each lane busy."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from emloc_jax.errors import ConfigError

__all__ = ["LaneTimes", "closed_form", "transition_block"]

PerBlock = float | Sequence[float] | np.ndarray
_PER_BLOCK = ("forward", "backward", "compress", "d2h", "host", "h2d", "apply", "update")


@dataclasses.dataclass(frozen=True, eq=False)
class LaneTimes:
    """Seconds of work per block and lane; scalars hold for all blocks.

    Attributes:
      blocks: number of blocks, L.
      forward, backward: (L,) on the device; the backward pass with its recomputation.
      compress: (L,) on the device, after the block's backward pass.
      d2h, host, h2d: (L,) download, Adam on the host, upload.
      apply: (L,) on the device, after the upload.
      update: (L,) Adam on the device, of the schedule `native` only.
      embed, head: once per pass, on the device, before the first and after the last block; the
        head with its backward pass.

    Raises:
      ConfigError: no blocks, an array of another length, or a time that is negative or not finite.

    Example:
      >>> LaneTimes(3, forward=0.1, backward=[0.2, 0.2, 0.3]).backward.tolist()
      [0.2, 0.2, 0.3]
    """

    blocks: int
    forward: PerBlock
    backward: PerBlock
    d2h: PerBlock = 0.0
    host: PerBlock = 0.0
    h2d: PerBlock = 0.0
    compress: PerBlock = 0.0
    apply: PerBlock = 0.0
    update: PerBlock = 0.0
    embed: float = 0.0
    head: float = 0.0

    def __post_init__(self):
        if self.blocks < 1:
            raise ConfigError(
                f"Times of {self.blocks} blocks were given; there must be at least 1."
            )
        for name in _PER_BLOCK:
            values = np.asarray(getattr(self, name), np.float64)
            if values.ndim > 1 or (values.ndim == 1 and len(values) != self.blocks):
                raise ConfigError(
                    f"`{name}` has the shape {values.shape}; give one time, or one for each of the "
                    f"{self.blocks} blocks."
                )
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ConfigError(f"`{name}` holds a time that is negative or not finite.")
            object.__setattr__(self, name, np.broadcast_to(values, (self.blocks,)).copy())
        for name in ("embed", "head"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; give seconds, 0 or more.")

    @property
    def total(self) -> dict[str, float]:
        """Sum over the blocks by name of the work, `embed` and `head` among them."""
        sums = {name: float(np.sum(getattr(self, name))) for name in _PER_BLOCK}
        return {**sums, "embed": self.embed, "head": self.head}


def closed_form(times: LaneTimes, schedule: str, *, micro_batches: int = 1) -> float:
    """Iteration time by formula: what a perfect filling of the lanes would take.

    With F, B, D, U, H, A the sums over blocks of forward (with embedding and head), backward with
    compression, download, host update, upload and apply:

        native            F + B + Adam on the device
        offload           F + max(B, D) + max(U, H, A)
        offload_delayed   max(F + B + A, U, D + H)       the two directions share the link
        layerwise, lsp    max(F + B + A, F + B + chain of block 0, D, U, H)

    Of several micro-batches, all but the last add F + B of device time. The chain of block 0 is its
    download, update, upload and apply; the embedding is taken off F beside it, since it waits for
    nothing. `lsp_serial` is as `offload`; `fcfs` and `switch` have the bound of `lsp`. These are
    the models of LSP-Offload (arXiv 2406.10181, long version).

    Raises:
      ConfigError: an unknown schedule.

    Example:
      >>> times = LaneTimes(32, forward=0.0122, backward=0.0281, d2h=0.02, host=0.039, h2d=0.02)
      >>> round(closed_form(times, "lsp"), 4), round(closed_form(times, "offload"), 4)
      (1.3686, 2.5376)
    """
    sums = times.total
    forward = sums["forward"] + times.embed + times.head
    backward = sums["backward"] + sums["compress"]
    d2h, host, h2d, apply = sums["d2h"], sums["host"], sums["h2d"], sums["apply"]
    if schedule == "native":
        return micro_batches * (forward + sums["backward"]) + sums["update"]
    before = (micro_batches - 1) * (forward + backward)
    device = before + forward + backward
    if schedule in ("offload", "lsp_serial"):
        return before + forward + max(backward, d2h) + max(host, h2d, apply)
    if schedule == "offload_delayed":
        return max(device + apply, host, d2h + h2d)
    if schedule in ("layerwise", "lsp", "fcfs", "switch"):
        chain = sum(float(getattr(times, name)[0]) for name in ("d2h", "host", "h2d", "apply"))
        return max(device + apply, device - times.embed + chain, d2h, host, h2d)
    raise ConfigError(
        f"The schedule '{schedule}' has no formula; there are native, offload, offload_delayed, "
        "layerwise, lsp, lsp_serial, fcfs and switch."
    )


def transition_block(times: LaneTimes) -> float:
    """The block below which first-come-first-served turns into last-come-first-served.

        L - (B - (d2h + host + h2d)) / max(d2h, host, h2d)

    with B the whole backward pass and the mean times of a block (Algorithm 3 of arXiv 2406.10181).
    Below the result lies a backlog that the next forward pass waits for. 0 or less: no backlog.

    Example:
      >>> times = LaneTimes(32, forward=0.0122, backward=0.0281, d2h=0.02, host=0.039, h2d=0.02)
      >>> round(transition_block(times), 2)
      10.97
    """
    lanes = [float(np.mean(getattr(times, name))) for name in ("d2h", "host", "h2d")]
    slowest = max(lanes)
    if slowest == 0:
        return 0.0
    backward = times.total["backward"] + times.total["compress"]
    return times.blocks - (backward - sum(lanes)) / slowest
