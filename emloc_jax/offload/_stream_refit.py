"""The check of all projectors on fresh data, in the memory of one block's gradients."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.errors import NonFiniteError
from emloc_jax.offload._block_slot import BlockSlot
from emloc_jax.offload._error import estimation_error
from emloc_jax.offload._fit import fit
from emloc_jax.offload._options import PipelineOptions
from emloc_jax.offload._outer_programs import OuterPrograms
from emloc_jax.offload._transport import transport

__all__ = ["PairReport", "RefitReport", "pair_error", "stream_refit"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PairReport:
    """What the check of one pair found and did.

    Attributes:
      block: index of the block.
      path: of the kernel within it.
      before: estimation error of the pair in use, on the calibration batch.
      after: of the pair from now on; equal to `before` where it was good enough.
      steps: of Adam; 0 where none was needed, also where scaling the pair was enough.
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
        """How many pairs have changed."""
        return sum(pair.after < pair.before for pair in self.pairs)

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
    parts: Sequence[Any],
    *,
    scale: float,
    step: int,
    options: PipelineOptions,
) -> RefitReport:
    """Walks the backward pass of calibration rows once, and looks at each block's pairs on its way.

    The full gradients of a block's kernels are formed, used and dropped before those of the next
    block. A pair above the threshold is fitted from the values it has; moments follow it into the
    new subspace, but not out of a pair that was never fitted: they start from zero then. A gradient
    of zero says nothing of a pair, which stays unchecked.

    Args:
      outer: parameters outside the blocks.
      blocks: all blocks, drained.
      programs: of what lies outside.
      parts: calibration rows, as micro-batches.
      scale: of the loss sum.
      step: number of steps taken so far.
      options: of the run.

    Raises:
      NonFiniteError: a gradient of the calibration batch that is not finite; nothing has changed
        in that block then.
    """
    passes = []
    for part in parts:
        x, context = programs.embed(outer, part)
        inputs = []
        for slot in blocks:
            inputs.append(x)
            x = slot.passes.forward(slot.params, x, context)
        _, dx, _ = programs.head(outer, x, part, np.float32(scale))
        passes.append([inputs, context, dx])
    reports = []
    for slot in reversed(blocks):
        sums: dict[str, jax.Array] = {}
        for walk in passes:
            inputs, context, dx = walk
            walk[2], own = slot.passes.full_gradients(slot.params, inputs.pop(), context, dx)
            sums = _add(sums, own) if sums else own
            del own
        reports += _refit_block(slot, sums, step, options)
    return RefitReport(step, tuple(reports))


def _refit_block(
    slot: BlockSlot, gradients: dict[str, jax.Array], step: int, options: PipelineOptions
) -> list[PairReport]:
    reports = []
    for path in list(slot.pairs):
        gradient, old = gradients.pop(path), slot.pairs[path]
        before = float(pair_error(gradient, *old))
        if np.isnan(before):
            raise NonFiniteError(
                f"The calibration gradient of '{path}' in block {slot.index} is not finite before "
                f"step {step + 1}, so its projectors cannot be checked. Look at the calibration "
                "rows, or lower the learning rate."
            )
        if not before > options.fit.threshold:
            if bool(jnp.any(gradient != 0)):
                slot.errors[path] = before
            reports.append(PairReport(slot.index, path, before, before, 0))
            continue
        p, q, report = fit(gradient, old[0], old[1], options.fit)
        after, fitted = float(report.error_after), np.isfinite(slot.errors.get(path, np.inf))
        if after < before:
            moments = slot.moments[path]
            if fitted:
                slot.moments[path] = _transported(moments, old, (p, q))
            else:
                slot.moments[path] = moments.replace(mu=0 * moments.mu, nu=0 * moments.nu)
            slot.pairs[path] = (p, q)
        elif not fitted:
            logger.warning(
                "block %d, %s: the fit did not lower the error of fresh projectors, %.2f; give it "
                "more steps or another rate",
                slot.index,
                path,
                before,
            )
        slot.errors[path] = after if fitted or after < before else np.inf
        reports.append(PairReport(slot.index, path, before, after, int(report.steps)))
    return reports


pair_error = jax.jit(estimation_error)


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: Any, own: Any) -> Any:
    return jax.tree.map(jnp.add, sums, own)


def _transported(moments: Any, old: Any, new: Any) -> Any:
    """`transport` where the moments live."""
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        old, new = jax.device_put((old, new), cpu)
        return _transport(moments, old, new)


@functools.partial(jax.jit, donate_argnums=0)
def _transport(moments: Any, old: Any, new: Any) -> Any:
    return transport(moments, old=old, new=new)
