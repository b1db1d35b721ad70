"""The check of all projectors on fresh data, in the memory of one block's gradients."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from emloc_jax.errors import NonFiniteError
from emloc_jax.offload._block_slot import BlockSlot
from emloc_jax.offload._error import estimation_error
from emloc_jax.offload._fit import fit
from emloc_jax.offload._options import PipelineOptions
from emloc_jax.offload._outer_programs import OuterPrograms
from emloc_jax.offload._transport import transport

__all__ = ["PairReport", "RefitReport", "stream_refit"]


@dataclasses.dataclass(frozen=True)
class PairReport:
    """What the check of one pair found and did.

    Attributes:
      block: index of the block.
      path: of the kernel within it.
      before: estimation error of the pair in use, on the calibration batch.
      after: of the pair from now on; equal to `before` where it was good enough.
      steps: of the fit, 0 where none was needed.
    """

    block: int
    path: str
    before: float
    after: float
    steps: int


@dataclasses.dataclass(frozen=True)
class RefitReport:
    """A check of all pairs, before a step.

    Attributes:
      step: number of steps taken before it.
      pairs: one report per kernel, deepest block first.
    """

    step: int
    pairs: tuple[PairReport, ...]

    @property
    def refitted(self) -> int:
        """How many pairs were fitted."""
        return sum(pair.steps > 0 for pair in self.pairs)

    @property
    def mean_before(self) -> float:
        """Mean error before."""
        return float(np.mean([pair.before for pair in self.pairs]))

    @property
    def mean_after(self) -> float:
        """Mean error after."""
        return float(np.mean([pair.after for pair in self.pairs]))


def stream_refit(
    outer: Any,
    blocks: list[BlockSlot],
    programs: OuterPrograms,
    batch: Any,
    *,
    scale: float,
    step: int,
    options: PipelineOptions,
) -> RefitReport:
    """Walks the backward pass of `batch` once, and looks at each block's pairs on its way.

    The full gradients of a block's kernels are formed, used and dropped before those of the next
    block. A pair above the threshold is fitted from the values it has; moments follow it into the
    new subspace, except from a pair that was never fitted, whose moments are zero anyway.

    Args:
      outer: parameters outside the blocks.
      blocks: all blocks, drained.
      programs: of what lies outside.
      batch: calibration rows.
      scale: of the loss sum.
      step: number of steps taken so far.
      options: of the run.

    Raises:
      NonFiniteError: a gradient of the calibration batch that is not finite; nothing has changed
        in that block then.
    """
    x, context = programs.embed(outer, batch)
    inputs = []
    for slot in blocks:
        inputs.append(x)
        x = slot.passes.forward(slot.params, x, context)
    _, dx, _ = programs.head(outer, x, batch, np.float32(scale))
    reports = []
    for slot in reversed(blocks):
        dx, gradients = slot.passes.full_gradients(slot.params, inputs.pop(), context, dx)
        reports += _refit_block(slot, gradients, step, options)
    return RefitReport(step, tuple(reports))


def _refit_block(
    slot: BlockSlot, gradients: dict[str, jax.Array], step: int, options: PipelineOptions
) -> list[PairReport]:
    reports = []
    for path in list(slot.pairs):
        gradient, old = gradients.pop(path), slot.pairs[path]
        before = float(_error(gradient, *old))
        if np.isnan(before) and not bool(jax.numpy.all(jax.numpy.isfinite(gradient))):
            raise NonFiniteError(
                f"The calibration gradient of '{path}' in block {slot.index} is not finite before "
                f"step {step + 1}, so its projectors cannot be checked. Look at the calibration "
                "rows, or lower the learning rate."
            )
        if not before > options.fit.threshold:
            slot.errors[path] = before
            reports.append(PairReport(slot.index, path, before, before, 0))
            continue
        p, q, report = fit(gradient, *old, options.fit)
        after = float(report.error_after)
        if after < before:
            if path in slot.errors:
                slot.moments[path] = _transported(slot.moments[path], old, (p, q))
            slot.pairs[path] = (p, q)
        slot.errors[path] = after
        reports.append(PairReport(slot.index, path, before, after, int(report.steps)))
    return reports


_error = jax.jit(estimation_error)


def _transported(moments: Any, old: Any, new: Any) -> Any:
    """`transport` where the moments live."""
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        old, new = jax.device_put((old, new), cpu)
        return _transport(moments, old, new)


@functools.partial(jax.jit, donate_argnums=0)
def _transport(moments: Any, old: Any, new: Any) -> Any:
    return transport(moments, old=old, new=new)
