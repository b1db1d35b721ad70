"""An emulator of a checkpoint that is never whole in memory."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emloc_jax.checkpoints import CheckpointBlocks, Pretrained
from emloc_jax.emulator import CompressionReport, MomentForm, SecondMoment
from emloc_jax.kernels import KernelSpec
from emloc_jax.streaming._arrays_file import ArraysFile, write_arrays
from emloc_jax.streaming._assemble import assemble, block_ranks, check_space, final_ranks
from emloc_jax.streaming._emulation import Emulation, Rules, emulation
from emloc_jax.streaming._factor_block import factor_block, finish_block, moment_samples
from emloc_jax.streaming._model import streamed_model
from emloc_jax.streaming._passes import Passes
from emloc_jax.streaming._spill import Spill
from emloc_jax.streaming._walk import walk
from emloc_jax.streaming._working import WorkingFolder

__all__ = ["stream_emulator"]


def stream_emulator(
    output: str | os.PathLike,
    base: Pretrained,
    batches: Sequence[Mapping[str, Any]],
    *,
    kernels: Mapping[str, KernelSpec],
    ratios: Rules | None = None,
    energy: Rules | None = None,
    budget: int | None = None,
    skip: str | Sequence[str] = (),
    weighting: str = "two_sided",
    damping: float | None = None,
    moments: MomentForm = "auto",
    rules: Any = None,
    seed: int | None = None,
    chunk: int = 256,
    activations: int | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> CompressionReport:
    """Calibrates, compresses and saves an emulator, reading the base one block at a time.

    All calibration rows run through one block before the next is read. One-sided, the parameters
    are read once, two-sided twice: forward to the loss, then backward, deepest block first. The
    folder is that of `calibrate`, `compress` and `save_emulator`, bit for bit where the layers are
    scanned.

    Every finished block is kept in `.NAME.partial-emulate` beside the output, with what the next
    one needs. With `energy` or `budget` the ranks wait for all spectra, so that factors up to the
    break-even rank and second moments of inputs of every block lie there until then.

    Args:
      output: a new folder.
      base: the original model, best loaded with `abstract=True`; its parameters are read from disk
        in any case.
      batches: with `tokens`, `targets`, `weights`, `positions` and `segments`, (B, T) each; empty
        for `weighting="plain"`.
      kernels: which kernels, from `find_kernels`; all of them in blocks.
      ratios, energy, budget, skip, weighting, damping: see `compress`.
      moments: `full`, `compact` or `auto`; see `calibrate`. The moments of one block are in memory
        at a time: for kernels of widths d and m > d two-sided, compact ones take d * d per side.
      rules: what is written down as having decided the ranks, as JSON.
      seed: of the calibration data, written down.
      chunk: tokens whose logits live at once.
      activations: bytes of activations that may lie in host memory; beyond, they go to files. None:
        no limit.
      resume: go on with what a killed run left; if there is nothing, start.
      on_step: called with the number of steps done and of all, a step being a pass of one block.

    Returns:
      What was done to each kernel.

    Raises:
      OutputExistsError: the output exists, or unfinished work of it and `resume` is not set.
      ResumeError: the unfinished work was started with something else.
      CheckpointError: the base cannot be read, or the disk is full; finished blocks stay.
      RatioError, UnmatchedRuleError, NoTokensError, NonFiniteError: see `calibrate`, `compress`.
      UnsupportedKernelError: a kernel outside the blocks.
      ConfigError: an unknown weighting or form of moments, or no kernel.
    """
    asked = emulation(
        base,
        batches,
        kernels=kernels,
        ratios=ratios,
        energy=energy,
        budget=budget,
        skip=skip,
        weighting=weighting,
        damping=damping,
        moments=moments,
        chunk=chunk,
    )
    written = {"rules": rules, "seed": seed}
    source = CheckpointBlocks(base)
    work = WorkingFolder(output, "emulate", asked.identity | written, resume=resume)
    if work.complete:
        work.remove()
        return CompressionReport.load(work.output / "report.json")
    check_space(asked, work)
    _factor(asked, source, work, chunk, activations, on_step)
    ranks = final_ranks(asked, work)
    final = "blocks"
    if asked.ranks is None:
        final = "cut"
        _cut(asked, source, work, ranks)
    return assemble(asked, source, work, final, ranks, rules=rules, seed=seed)


def _factor(
    asked: Emulation,
    source: CheckpointBlocks,
    work: WorkingFolder,
    chunk: int,
    activations: int | None,
    on_step: Callable[[int, int], None] | None,
) -> None:
    """Calibrates and factors what is not there yet."""
    count = asked.num_blocks
    todo = [i for i in range(count) if not _file(work, "blocks", i).is_file()]
    if not todo:
        return

    def finish(index: int, params: Any, moments: dict[str, SecondMoment] | None) -> None:
        layer = asked.compressed(index, asked.ranks)
        arrays = factor_block(
            layer,
            params,
            moments,
            weighting=asked.weighting,
            damping=asked.damping,
            ranks=None if asked.ranks is None else block_ranks(layer, asked.ranks),
        )
        if moments is not None:
            place = (index, count) if asked.scanned else (0, 1)
            arrays |= moment_samples(moments, *place)
        write_arrays(_file(work, "blocks", index), arrays)

    walks = 2 if asked.weighting == "two_sided" else 1
    done, total = iter(range(1, walks * count + 1)), walks * len(todo)

    def step() -> None:
        if on_step is not None:
            on_step(min(next(done, total), total), total)

    passes = Passes(
        streamed_model(asked.base.model, chunk=chunk),
        source,
        asked.batches,
        asked.taps,
        Spill(work / "activations", activations),
        finish,
        step,
    )
    match asked.weighting:
        case "plain":
            passes.plain(todo)
        case "one_sided":
            passes.one_sided(todo[0])
        case _:
            passes.two_sided(todo[-1])


def _cut(
    asked: Emulation, source: CheckpointBlocks, work: WorkingFolder, ranks: Mapping[str, int | None]
) -> None:
    """Cuts the factors of every block to their ranks, once those are known."""
    todo = [i for i in range(asked.num_blocks) if not _file(work, "cut", i).is_file()]
    for index, params in walk(source, todo):
        layer, kept = asked.compressed(index, ranks), ArraysFile(_file(work, "blocks", index))
        own = block_ranks(layer, ranks)
        arrays = finish_block(layer, params, kept, own, asked.weighting)
        write_arrays(_file(work, "cut", index), arrays)


def _file(work: WorkingFolder, kind: str, index: int) -> Any:
    return work / kind / f"{index:05d}.safetensors"
