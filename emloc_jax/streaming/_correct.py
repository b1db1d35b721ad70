"""The correction of adapters with one kernel of the original in memory at a time."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc_jax.adapters import (
    CANDIDATES,
    Adapter,
    Bound,
    CorrectionReport,
    KernelCorrection,
    Problem,
    Trainable,
    best_limit,
    check_limit,
    correct_kernel,
    kernel_corrections,
    limit_trials,
    limits_to_try,
    lora_alone,
    problems,
)
from emloc_jax.checkpoints import CheckpointBlocks, EmulatorBlocks, Pretrained, load_emulator
from emloc_jax.emulator import SecondMoment, Taps
from emloc_jax.errors import MomentShapeError
from emloc_jax.kernels import KernelSpec
from emloc_jax.streaming._layer_adapters import join_adapter, split_adapter
from emloc_jax.streaming._layer_kernels import layer_kernels
from emloc_jax.streaming._loss import stream_losses
from emloc_jax.streaming._model import streamed_model
from emloc_jax.streaming._passes import Passes
from emloc_jax.streaming._spill import Spill

__all__ = ["StreamedCorrection"]

Batches = Sequence[Mapping[str, Any]]
Visit = Callable[[Problem], None]


class StreamedCorrection:
    """`correct`, `choose_limit` and `correction_report` on models that stay on disk.

    Kernels are read from the memory maps of the base and of the emulator, one at a time. The
    results are those of the functions that take whole trees, bit for bit.

    Args:
      adapters: as trained on the emulator.
      base: the original model, best loaded with `abstract=True`.
      emulator: folder of the emulator.
      bound: see `correct`.
      weights: batches whose second moments weigh the correction; they run through the original a
        block at a time whenever the correction is computed. None: the plain form.
      kernels: from `find_kernels`; needed with `weights`.
      activations: bytes of activations that may lie in host memory; None: no limit.

    Raises:
      AdapterMismatchError, CheckpointError: see `correct`, `load_emulator`; nothing is read before.
    """

    def __init__(
        self,
        adapters: Mapping[str, Trainable],
        base: Pretrained,
        emulator: str | os.PathLike,
        *,
        bound: Bound = "row",
        weights: Batches | None = None,
        kernels: Mapping[str, KernelSpec] | None = None,
        activations: int | None = None,
    ):
        lora = lora_alone(adapters, "A streamed correction")
        problems(lora, base.params, load_emulator(emulator, base, abstract=True), None)
        self._adapters, self._base = lora, base
        self._bound: Bound = bound
        self._source, self._emulator = CheckpointBlocks(base), EmulatorBlocks(emulator, base)
        self._parts = {path: split_adapter(path, one) for path, one in lora.items()}
        self._weights, self._kernels = weights, kernels
        self._activations = activations

    def choose_limit(
        self,
        batches: Batches,
        *,
        candidates: Sequence[float] = CANDIDATES,
        chunk: int = 256,
        on_block: Callable[[int], None] | None = None,
    ) -> tuple[float, dict[float, float]]:
        """The best limit and the losses, as `choose_limit` gives them.

        All candidates are evaluated in one walk over the blocks of the original.

        Args:
          batches: the calibration set.
          candidates: limits to try besides 0.
          chunk: tokens whose logits live at once.
          on_block: called with the number of blocks done.

        Raises:
          NoTokensError, NonFiniteError, RatioError: see `choose_limit`.
        """
        for limit in candidates:
            check_limit(limit, self._bound)
        limits = limits_to_try(candidates)
        found: dict[float, dict[str, Adapter]] = {limit: {} for limit in limits}

        def visit(problem: Problem) -> None:
            for limit, adapter in limit_trials(problem, limits, self._bound).items():
                found[limit][problem.path] = adapter

        self._visit(visit)
        trials = {limit: self._joined(parts) for limit, parts in found.items()}
        totals = stream_losses(
            self._base.model,
            self._source,
            batches,
            trials,
            chunk=chunk,
            activations=self._activations,
            on_block=on_block,
        )
        return best_limit(totals)

    def correct(self, limit: float) -> tuple[dict[str, Adapter], CorrectionReport]:
        """The corrected adapters, and what was done to each kernel.

        Args:
          limit: see `correct`; with 0 the adapters come back unchanged.

        Raises:
          RatioError, NonFiniteError: see `correct`.
        """
        check_limit(limit, self._bound)
        limit = float(limit)
        parts: dict[str, Adapter] = {}
        entries: dict[str, list[KernelCorrection]] = {}

        def visit(problem: Problem) -> None:
            parts[problem.path] = correct_kernel(problem, limit, self._bound)
            entries[problem.path] = kernel_corrections(problem, limit, self._bound)

        self._visit(visit)
        ordered = []
        for path, split in self._parts.items():
            stacked = bool(self._adapters[path].stack_shape)
            for layer, (part, _) in enumerate(split):
                name = f"{path}[{layer}]" if stacked else path
                ordered += [dataclasses.replace(e, path=name) for e in entries[part]]
        weighted = self._weights is not None
        report = CorrectionReport(limit, self._bound, weighted, tuple(ordered))
        return (self._joined(parts) if limit > 0 else dict(self._adapters)), report

    def _joined(self, parts: Mapping[str, Adapter]) -> dict[str, Adapter]:
        return {
            path: join_adapter(self._adapters[path], [parts[part] for part, _ in split])
            for path, split in self._parts.items()
        }

    def _visit(self, visit: Visit) -> None:
        """Calls `visit` with the problem of every kernel, one after the other."""
        if self._weights is None:
            for split in self._parts.values():
                for path, adapter in split:
                    visit(self._problem(path, adapter, None))
            return
        chosen = {p: s for p, s in (self._kernels or {}).items() if p in self._adapters}
        lacking = [path for path in self._adapters if path not in chosen]
        if lacking:
            raise MomentShapeError(
                f"The calibration-weighted correction needs second moments of '{lacking[0]}', "
                "which is not among the kernels given. Pass all kernels, or no `weights`."
            )
        layers = layer_kernels(
            chosen, self._source.num_blocks, scanned=self._base.model.scan_layers
        )
        by_path = {part: adapter for split in self._parts.values() for part, adapter in split}

        def finish(index: int, params: Any, moments: dict[str, SecondMoment] | None) -> None:
            for name, moment in (moments or {}).items():
                path = layers[index].full(name)
                visit(self._problem(path, by_path[path], moment))

        with tempfile.TemporaryDirectory(prefix="emloc-") as home:
            Passes(
                streamed_model(self._base.model),
                self._source,
                self._weights,
                lambda index: _full_taps(layers[index].specs),
                Spill(Path(home), self._activations),
                finish,
            ).one_sided(0)

    def _problem(self, path: str, adapter: Adapter, moment: SecondMoment | None) -> Problem:
        original = _nested(path, self._source.parameter(path))
        emulated = _nested(path, self._emulator.leaf(path))
        moments = None if moment is None else {path: moment}
        return problems({path: adapter}, original, emulated, moments)[0]


def _full_taps(specs: Mapping[str, KernelSpec]) -> Taps | None:
    """The correction needs input moments in full."""
    return Taps(specs, moments="full") if specs else None


def _nested(path: str, leaf: Any) -> dict[str, Any]:
    tree = leaf
    for key in reversed(path.split("/")):
        tree = {key: tree}
    return tree
