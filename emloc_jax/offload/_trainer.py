"""The pipelined trainer: full-parameter training of a block stack through four lanes."""

import collections
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.models import BlockStack
from emloc_jax.offload._adam_update import host_update
from emloc_jax.offload._alone_jit import AloneJit
from emloc_jax.offload._batch import Batch, cut, token_inputs, total_weight
from emloc_jax.offload._block_slot import BlockSlot
from emloc_jax.offload._lanes import Delay, no_delay
from emloc_jax.offload._link import DevicePutLink, Link
from emloc_jax.offload._options import PipelineOptions
from emloc_jax.offload._outer_programs import HeadLoss, OuterPrograms
from emloc_jax.offload._schedules import Schedule, schedule_named
from emloc_jax.offload._setup import set_up
from emloc_jax.offload._state import PipelineState, check_state, read_state, write_state
from emloc_jax.offload._step_flow import Held, Lanes, StepFlow
from emloc_jax.offload._stream_refit import RefitReport, stream_refit
from emloc_jax.offload._timeline import Timeline

__all__ = ["PipelinedTrainer"]

# Programs that may be dispatched and not yet computed. XLA allocates what a program returns when
# it is dispatched, so running far ahead would hold the gradients of many blocks at once.
RUN_AHEAD = 2

# As programs of their own, since lanes may be compiling while a step asks for them.
add_trees = AloneJit(lambda one, other: jax.tree.map(jnp.add, one, other))
step_key = AloneJit(jax.random.fold_in)
split_for = AloneJit(lambda key, number: jax.random.split(jax.random.fold_in(key, number)))


class PipelinedTrainer:
    """Trains all parameters of a block stack, with Adam on the host and four lanes at work.

    One step: forward through the blocks, keeping each block's input; backward through the blocks,
    deepest first. As soon as a block's gradients are there they go down to the host, Adam turns
    them into an update, and it comes back and is added to the block's parameters, while the device
    goes on with the blocks before. A block's next forward pass waits for its own update and for
    nothing else, so no weight is ever stale (LSP-Offload, arXiv 2406.10181, layer-wise schedule).
    With a compressing schedule the gradient of a chosen kernel is `P^T G Q` and never exists in
    full; projectors are fitted before the first step and checked every `refit_every` steps.

    The results do not depend on timing: `overlap=False` runs the same programs in one thread, bit
    for bit.

    Args:
      stack: the model; `block_stack(model, wrap=intercept)`.
      params: its parameters; copied, since training replaces them in place.
      head_loss: `(outer, x, batch) -> (sum, weight)`, with `outer` the parameters outside the
        blocks and x what the last block returned.
      batch: an example of a batch, for shapes.
      schedule: a name of `SCHEDULES`.
      options: see `PipelineOptions`.
      inputs: from a batch to the arguments of `stack.embed` after the parameters; by default
        tokens, positions and segments.
      weight: from a batch to the weight its loss sum is divided by; by default its `weights`.
      calibration: from the number of a step to a fresh batch on which projectors are checked and
        fitted; needed by schedules that compress.
      link: how arrays cross.
      overlap: False runs all lanes in the calling thread, one thing at a time.
      timeline: gets what ran when.
      delay: prolongs work, for tests and simulations.

    Raises:
      ConfigError, UnmatchedRuleError, UnsupportedKernelError, ProjectorError: options that do not
        fit the model; nothing has been computed then.
    """

    def __init__(
        self,
        stack: BlockStack,
        params: Mapping[str, Any],
        head_loss: HeadLoss,
        batch: Batch,
        *,
        schedule: str = "lsp",
        options: PipelineOptions = PipelineOptions(),
        inputs: Callable[[Batch], tuple[Any, ...]] | None = None,
        weight: Callable[[Batch], float] | None = None,
        calibration: Callable[[int], Batch] | None = None,
        link: Link | None = None,
        overlap: bool = True,
        timeline: Timeline | None = None,
        delay: Delay = no_delay,
    ):
        self.schedule: Schedule = schedule_named(schedule)
        if self.schedule.compress and calibration is None:
            raise ConfigError(
                f"The schedule '{schedule}' compresses gradients, so it needs `calibration`: a "
                "function from the number of a step to a batch that projectors are fitted on."
            )
        self.options, self.stack, self.timeline = options, stack, timeline
        if not isinstance(stack, BlockStack):
            raise ConfigError(
                f"A pipelined trainer was asked for on a {type(stack).__name__}; it walks a "
                "BlockStack. Use block_stack(model, wrap=intercept), declare one for a model of "
                "yours, or train with lsp_adamw, which needs none."
            )
        self._weight = total_weight if weight is None else weight
        self._calibration = calibration
        inputs = token_inputs if inputs is None else inputs
        made = set_up(stack, params, self.schedule, options, inputs, batch)
        self._outer, self._blocks = made.outer, made.blocks
        self._programs = OuterPrograms(
            stack.embed, inputs, head_loss, made.outer.updates, wire=options.wire_dtype
        )
        self._host_update = host_update(options.adam, options.wire_dtype)
        self._link = DevicePutLink() if link is None else link
        self._lanes = Lanes(self._link, overlap=overlap, timeline=timeline, delay=delay)
        self._key = jax.random.key(options.seed)
        self._ahead: collections.deque[Future] = collections.deque()
        self.steps = 0
        self.skipped = 0
        self.refits: list[RefitReport] = []

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step.

        Returns when the backward pass has ended; updates may still be on their way, and the next
        step waits for each where it needs it.

        Args:
          batch: arrays with the rows first; cut into `accumulation` parts.

        Returns:
          `loss` (mean over the batch), `weight`, `grad_norm` (before clipping), `learning_rate`,
          `finite`, and `skipped`: steps so far that were not. A block with a gradient that is not
          finite is left as it is, and with clipping the whole step changes nothing.

        Raises:
          DataError: a batch without weight.
          ConfigError: a batch that cannot be cut evenly.
        """
        options, number = self.options, self.steps
        parts = cut(batch, options.accumulation)
        weight = float(self._weight(batch))
        if not weight > 0:
            raise DataError(f"Step {number + 1}: no token of the batch is learnt.")
        if self.schedule.compress and (number % options.refit_every == 0 or self._unchecked()):
            self.refit()
        rate = np.float32(options.rate(number - self.skipped))
        flow = StepFlow(self._lanes, self.schedule, step=number, clip=options.clip)
        if not self.schedule.layerwise and not self.schedule.delayed:
            self.drain()
        key = step_key(self._key, np.uint32(number))
        sums: dict[int, Any] = {}
        losses = []
        try:
            for part_number, part in enumerate(parts):
                last = part_number == len(parts) - 1
                losses.append(self._pass(part, 1 / weight, sums, flow, rate, key, last=last))
            norm = flow.finish_backward()
            if self.schedule.delayed:
                for slot in self._slots:
                    slot.ready(behind=1)
        except BaseException as error:
            flow.abort(error)  # so that nobody waits for updates that will not come
            raise
        finite = bool(np.isfinite(norm))
        self.steps += 1
        self.skipped += not finite
        return {
            "loss": sum(float(loss) for loss in losses) / weight,
            "weight": weight,
            "grad_norm": norm,
            "learning_rate": float(rate),
            "finite": finite,
            "skipped": self.skipped,
        }

    def _pass(
        self,
        batch: Batch,
        scale: float,
        sums: dict[int, Any],
        flow: StepFlow,
        rate: np.float32,
        key: jax.Array,
        *,
        last: bool,
    ) -> jax.Array:
        """Forward and backward pass of a micro-batch; the last one starts the updates."""
        behind = self._behind

        def watch(arrays: Any, block: int, name: str) -> None:
            self._pace(self._lanes.watch(arrays, step=flow.step, block=block, name=name))

        outer = self._outer.ready(behind=behind)
        x, context = self._programs.embed(outer, batch)
        inputs = []
        for slot in self._blocks:
            inputs.append(x)
            x = slot.passes.forward(slot.ready(behind=behind), x, context)
            watch(x, slot.index, "forward")
        loss, dx, outer_sums = self._programs.head(outer, x, batch, np.float32(scale))
        watch(dx, len(self._blocks), "head")
        for slot in reversed(self._blocks):
            dx, gradients = slot.passes.backward(
                slot.params, slot.pairs, inputs.pop(), context, dx, sums.get(slot.index), last=last
            )
            if last:
                self._start(slot, gradients, flow, rate, key)
            else:
                sums[slot.index] = gradients
                watch(dx, slot.index, "backward")
        if self._outer.updates.plan.trained:
            index = self._outer.index
            if index in sums:
                outer_sums = add_trees(sums.pop(index), outer_sums)
            done = self._programs.embed_backward(outer, batch, dx, outer_sums, last=last)
            if last:
                self._start(self._outer, done, flow, rate, key)
            else:
                sums[index] = done
        return loss

    def _start(
        self, slot: BlockSlot, gradients: Any, flow: StepFlow, rate: np.float32, key: jax.Array
    ) -> None:
        """Sends a block's gradients on their way."""
        down, up = slot_keys(key, slot)

        def on_device(gradients: Any, scale: float) -> None:
            token = slot.update_on_device(gradients, np.float32(scale), rate, down)
            self._lanes.witness(token, step=flow.step, block=slot.index, name="update")

        def on_host(gradients: Any, scale: float) -> Any:
            update, slot.moments = self._host_update(gradients, slot.moments, rate, scale)
            return update

        slot.pending.append(
            flow.start(
                slot.index,
                gradients,
                on_device=on_device if gradients.device else None,
                on_host=on_host if gradients.host else None,
                on_return=self._on_return(slot, up, flow.step),
            )
        )
        self._pace(flow.computed(slot.index))

    def _on_return(self, slot: BlockSlot, key: jax.Array, step: int) -> Callable[[Any], None]:
        """What puts an update of `step` into the parameters."""

        def on_return(update: Any) -> None:
            token = slot.apply(update, key)
            self._lanes.witness(token, step=step, block=slot.index, name="apply")

        return on_return

    def _pace(self, future: Future) -> None:
        """Waits until no more than a few programs are dispatched and not computed."""
        self._ahead.append(future)
        while len(self._ahead) > RUN_AHEAD:
            self._ahead.popleft().result()

    def refit(self) -> RefitReport:
        """Checks every pair on a fresh calibration batch, and fits those that are not good enough.

        Drains first, so that no update of an old subspace is expanded in a new one. Gradients are
        formed one block at a time.

        Raises:
          DataError: the calibration batch is empty.
        """
        assert self._calibration is not None
        self.drain()
        batch = self._calibration(self.steps)
        weight = float(self._weight(batch)) if jax.tree.leaves(batch) else 0.0
        if not weight > 0:
            raise DataError(
                f"The projectors are to be fitted before step {self.steps + 1}, but the "
                "calibration batch holds no token that is learnt. Give rows to calibrate on."
            )
        try:
            parts = cut(batch, self.options.accumulation)
        except ConfigError:  # fewer rows than micro-batches, say: all at once
            parts = [batch]
        report = stream_refit(
            self._outer.params,
            self._blocks,
            self._programs,
            parts,
            scale=1 / weight,
            step=self.steps,
            options=self.options,
        )
        self.refits.append(report)
        return report

    @property
    def _slots(self) -> tuple[BlockSlot, ...]:
        return (self._outer, *self._blocks)

    @property
    def _behind(self) -> int:
        """How many updates of a slot wait for a later step."""
        return 1 if self.schedule.delayed else 0

    def _unchecked(self) -> bool:
        """Whether a pair has seen no gradient but zero, behind a head that began at zero say."""
        return any(path not in slot.errors for slot in self._blocks for path in slot.pairs)

    def drain(self) -> None:
        """Waits until every update that is on its way has been applied.

        With a delayed schedule the last one has only arrived: it is applied when its time comes.
        """
        for slot in self._slots:
            slot.ready(behind=self._behind)
            slot.held()

    def params(self) -> Any:
        """The model's parameters with all updates applied. The next step may consume them: copy
        what is to be kept."""
        self.drain()
        return self.stack.join(self._outer.finished(), [slot.finished() for slot in self._blocks])

    def state(self) -> PipelineState:
        """All that a resumption needs, drained; consumed by the next step."""
        self.drain()
        wire = self.options.wire_dtype if self.schedule.delayed else None
        return read_state(self.steps, self.skipped, self._outer, self._blocks, held=wire)

    def load(self, state: PipelineState) -> None:
        """Goes on from a state of a trainer with the same options.

        Raises:
          ResumeError: its structure, shapes or dtypes are others, or its projectors.
        """
        check_state(state, self.state())
        self.steps, self.skipped = write_state(state, self._outer, self._blocks)
        for slot, held in zip(self._slots, state.held, strict=False):  # of a delayed schedule
            slot.pending.clear()
            if held["waits"]:
                step = self.steps - 1
                up = slot_keys(step_key(self._key, np.uint32(step)), slot)[1]
                update = jax.device_put(held["update"], jax.local_devices()[0], may_alias=False)
                slot.pending.append(Future())
                slot.pending[0].set_result(Held(update, self._on_return(slot, up, step)))

    def close(self) -> None:
        """Drains and ends the lanes' threads."""
        try:
            self.drain()
        finally:
            self._lanes.close()

    def __enter__(self) -> "PipelinedTrainer":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.close()
        else:
            self._lanes.close()


def slot_keys(key: jax.Array, slot: BlockSlot) -> jax.Array:
    """The keys of a slot's rounding in a step: of what stays on the device, of what comes back."""
    return split_for(key, np.uint32(slot.index + 1))
