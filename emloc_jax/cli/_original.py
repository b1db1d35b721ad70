"""The original model of a run: whole in memory, or read a block at a time."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from emloc_jax._bytes import parse_bytes
from emloc_jax.adapters import CorrectionReport, Trainable, attach, correction_report, split_whole
from emloc_jax.checkpoints import CheckpointBlocks, save_pretrained
from emloc_jax.cli._checks import parse_limit
from emloc_jax.cli._console import status, tick
from emloc_jax.cli._data import Dataset
from emloc_jax.cli._options import (
    CorrectionOptions,
    DataOptions,
    LoraOptions,
    ScoreOptions,
    TrainOptions,
)
from emloc_jax.cli._session import Session
from emloc_jax.cli._stages import (
    Scores,
    correct_session,
    evaluation_figures,
    input_moments,
    score,
)
from emloc_jax.cli._stream import StreamedRun
from emloc_jax.cli._training import Step, StepMaker, attach_for_training, step_in_memory
from emloc_jax.kernels import intercept
from emloc_jax.models import block_stack
from emloc_jax.streaming import (
    AdaptedBlocks,
    StreamedCorrection,
    StreamedLoraStep,
    stream_loss,
    stream_merge,
    streamed_lora_programs,
)
from emloc_jax.training import make_head_loss

__all__ = ["Corrected", "Original", "open_original"]

Adapters = dict[str, Trainable]
Batches = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Corrected:
    """What a correction gave.

    Attributes:
      adapters: corrected.
      limit: that was used.
      losses: on the calibration rows, by limit, if the limit was chosen by them.
      report: what was done to each kernel.
    """

    adapters: Adapters
    limit: float
    losses: dict[float, float]
    report: CorrectionReport


class Original(Protocol):
    """The original as stages use it; both kinds give the same results."""

    session: Session
    streamed: bool

    def score(
        self,
        adapters: Adapters | None,
        data: Dataset,
        options: ScoreOptions,
        data_options: DataOptions,
        name: str,
    ) -> Scores:
        """Loss and scores on test rows, with adapters if there are any."""
        ...

    def test_figures(self, adapters: Adapters, batches: Batches) -> dict[str, float]:
        """What an evaluation during training records."""
        ...

    def lora_step(self, options: TrainOptions, lora: LoraOptions) -> StepMaker:
        """The step that trains adapters on the original."""
        ...

    def correct(
        self,
        adapters: Adapters,
        emulator: Any,
        folder: Path,
        options: CorrectionOptions,
        choosing: Batches,
        weights: Batches | None,
        moments: Any = None,
    ) -> Corrected:
        """Corrects adapters that were trained on an emulator.

        Args:
          adapters: as trained.
          emulator: its parameters, in memory; a streamed original takes them from `folder`.
          folder: of the emulator.
          options: of the correction.
          choosing: batches that choose the limit.
          weights: batches that weigh the correction; None: nothing does.
          moments: of those batches, if they were measured before.
        """
        ...

    def write_merged(self, folder: Path, adapters: Adapters | None, *, resume: bool = False) -> Any:
        """Writes the model with adapters added in as a Hugging Face folder."""
        ...


class WholeOriginal:
    """An original whose parameters lie in memory; see `Original`."""

    streamed = False

    def __init__(self, session: Session):
        self.session = session

    def score(self, adapters, data, options, data_options, name):
        """See `Original`."""
        params = self.session.with_adapters(self.session.base.params, adapters)
        return score(self.session, params, data, options, data_options, name)

    def test_figures(self, adapters, batches):
        """See `Original`."""
        params = self.session.with_adapters(self.session.base.params, adapters)
        return evaluation_figures(self.session, params, batches)

    def lora_step(self, options, lora):
        """See `Original`."""
        params, combine = self.session.base.params, attach_for_training(lora)
        return step_in_memory(self.session, params, combine, options)

    def correct(self, adapters, emulator, folder, options, choosing, weights, moments=None):
        """See `Original`."""
        session = self.session
        if weights is not None and moments is None:
            lora, _ = split_whole(adapters)
            moments = input_moments(session, weights, list(lora))
        corrected, limit, losses = correct_session(
            session, adapters, emulator, options, choosing, moments
        )
        report = correction_report(
            adapters,
            session.base.params,
            emulator,
            limit=limit,
            bound=options.bound,
            moments=moments if options.weighted else None,
        )
        return Corrected(corrected, limit, losses, report)

    def write_merged(self, folder, adapters, *, resume=False):
        """See `Original`; there is nothing to resume, since a folder is written in one step."""
        params = self.session.base.params
        # Attached, not merged: the writer adds them tensor by tensor, without a second model.
        params = params if adapters is None else attach(params, adapters)
        with status("Writing the model"):
            save_pretrained(folder, params, like=self.session.base)


class StreamedOriginal:
    """An original whose blocks are read from its checkpoint when they are needed; see `Original`.

    Args:
      session: of a language model, its parameters abstract.
      chunk: tokens whose logits live at once.
      activations: that may lie in host memory, as text; the rest goes to files.
    """

    streamed = True

    def __init__(self, session: Session, *, chunk: int = 256, activations: str = "4GiB"):
        self.session = session
        self.source = CheckpointBlocks(session.base)
        self._chunk, self._activations = chunk, parse_bytes(activations)
        self._step: StreamedLoraStep | None = None

    def score(self, adapters, data, options, data_options, name):
        """See `Original`."""
        self._release()
        source = self.source if adapters is None else AdaptedBlocks(self.source, adapters)
        run = StreamedRun(self.session, source)
        return run.score(data, options, data_options, name)

    def test_figures(self, adapters, batches):
        """See `Original`."""
        self._release()
        loss = stream_loss(
            self.session.base.model,
            self.source,
            batches,
            adapters=adapters,
            chunk=self._chunk,
            activations=self._activations,
        ).loss
        return {"test_loss": loss}

    def lora_step(self, options, lora):
        """See `Original`."""
        base = self.session.base

        def make(state: Any, batch: Any, tx: Any, schedule: Any) -> Step:
            step = self._step = StreamedLoraStep(
                block_stack(base.model, wrap=intercept),
                make_head_loss(self.session.apply, chunk=self._chunk),
                tx,
                accumulation=options.accumulation,
                clip=options.clip,
                schedule=schedule,
                dropout=lora.dropout,
                inputs_in=options.block_inputs,
            )
            memory = streamed_lora_programs(step, base.params, state.trainables, batch)
            return Step(step, self.source, memory.peak())

        return make

    def correct(self, adapters, emulator, folder, options, choosing, weights, moments=None):
        """See `Original`."""
        self._release()
        work = StreamedCorrection(
            adapters,
            self.session.base,
            folder,
            bound=options.bound,
            weights=weights,
            kernels=self.session.kernels,
            activations=self._activations,
        )
        losses: dict[float, float] = {}
        if options.limit == "auto":
            with tick("Choosing the limit", self.source.num_blocks) as move:
                limit, losses = work.choose_limit(choosing, on_block=move)
        else:
            limit = parse_limit(options.limit)
        corrected, report = work.correct(limit)
        return Corrected({**corrected}, limit, losses, report)

    def write_merged(self, folder, adapters, *, resume=False):
        """See `Original`; finished shards are kept for a resumption."""
        self._release()
        with tick("Writing the model", 1) as move:
            stream_merge(
                folder,
                self.session.base,
                adapters,
                resume=resume,
                on_shard=lambda done, total: move(done, total=total),
            )

    def _release(self) -> None:
        """Lets go of what a training step keeps on the device between its calls."""
        if self._step is not None:
            self._step.release()


def open_original(session: Session, *, chunk: int = 256, activations: str = "4GiB") -> Original:
    """The original of a session: streamed if its parameters are abstract."""
    leaf = jax.tree.leaves(session.base.params)[0]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return StreamedOriginal(session, chunk=chunk, activations=activations)
    return WholeOriginal(session)
