"""From the files of all blocks to the folder of an emulator."""

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey

from emloc_jax.checkpoints import (
    CheckpointBlocks,
    EmulatorPlan,
    StackedSample,
    emulator_config,
    plan_emulator,
    stacked_fingerprint,
    write_emulator,
)
from emloc_jax.emulator import (
    CompressionReport,
    Factorization,
    SecondMoment,
    allocate,
    kernel_report,
)
from emloc_jax.errors import CheckpointError
from emloc_jax.kernels import KernelSpec, LowRankKernel, set_leaves
from emloc_jax.streaming._arrays_file import ArraysFile
from emloc_jax.streaming._emulation import Emulation
from emloc_jax.streaming._layer_kernels import LayerKernels
from emloc_jax.streaming._working import WorkingFolder

__all__ = ["assemble", "block_ranks", "check_space", "final_ranks"]

Ranks = Mapping[str, int | None]


def block_ranks(layer: LayerKernels, ranks: Ranks) -> dict[str, int]:
    """Ranks by path inside the block, of the block's kernels that have one."""
    found = {name: ranks.get(layer.paths[name]) for name in layer.specs}
    return {name: rank for name, rank in found.items() if rank is not None}


def check_space(asked: Emulation, work: WorkingFolder) -> None:
    """Refuses before any long work what cannot fit on the disk: the factors here and the output.

    Raises:
      CheckpointError: too little space.
    """
    if asked.ranks is None:
        return  # known only with the ranks; every file is checked as it is written
    plan = _plan(asked, asked.ranks)
    whole = sum(tensor.nbytes for tensor in plan.tensors)
    factors = sum(t.nbytes for t in plan.tensors if t.name.endswith(("/left", "/right")))
    there = sum(file.stat().st_size for file in work.path.glob("blocks/*"))
    needs, free = whole + max(factors - there, 0), shutil.disk_usage(work.path).free
    if needs > free:
        raise CheckpointError(
            f"No space left to write {work.output}: {needs:,} bytes are needed for the emulator "
            f"and for its factors until it is whole; {free:,} bytes are free. Free some space, or "
            "choose an output on another disk."
        )


def final_ranks(asked: Emulation, work: WorkingFolder) -> Ranks:
    """Ranks by path, from the ratios or from the spectra of all blocks."""
    if asked.ranks is not None:
        return asked.ranks
    files = _files(asked, work, "blocks")
    spectra = {
        path: Factorization(None, None, _stacked(asked, files, path, "squares"))  # pyright: ignore[reportArgumentType]
        for path in asked.chosen
    }
    moments = None
    if asked.weighting != "plain":
        moments = {
            path: SecondMoment(None, _stacked(asked, files, path, "count"))  # pyright: ignore[reportArgumentType]
            for path in asked.chosen
        }
    return allocate(
        spectra,
        moments,
        asked.chosen,
        asked.others,
        energy=asked.energy,
        budget=asked.budget,
        weighting=asked.weighting,
    )


def assemble(
    asked: Emulation,
    source: CheckpointBlocks,
    work: WorkingFolder,
    kind: str,
    ranks: Ranks,
    *,
    rules: Any,
    seed: int | None,
) -> CompressionReport:
    """Writes the emulator folder and removes the working one.

    Args:
      asked: the request.
      source: of the parameters that stay whole.
      work: holds the blocks' files.
      kind: the folder in it with the factors as stored.
      ranks: by path.
      rules, seed: written down.
    """
    measured, files = _files(asked, work, "blocks"), _files(asked, work, kind)
    report = CompressionReport(
        tuple(_entry(asked, spec, ranks, files) for spec in asked.kernels.values()),
        asked.weighting,
    )
    plan = _plan(asked, ranks)
    config = emulator_config(
        plan,
        base=asked.base,
        rules=rules,
        weighting=asked.weighting,
        calibration=_fingerprint(asked, measured),
        seed=seed,
    )

    def read(name: str) -> Any:
        path, _, side = name.rpartition("/")
        if path in plan.ranks:
            pieces = (file.read(f"{inner}:{side}") for file, inner in _places(asked, files, path))
        else:
            path = name
            pieces = (source.parameter(part) for part in _parts(asked, name))
        stacked = asked.scanned and path.startswith("layers/")
        return pieces if stacked else next(pieces)

    needs = sum(tensor.nbytes for tensor in plan.tensors)
    work.finish(lambda folder: write_emulator(folder, plan, read, config, report), needs=needs)
    return report


def _plan(asked: Emulation, ranks: Ranks) -> EmulatorPlan:
    boxes = {}
    for path, rank in ranks.items():
        if rank is None:
            continue
        spec = asked.kernels[path]
        stack = spec.stack_shape
        left = jax.ShapeDtypeStruct((*stack, *spec.in_shape, rank), spec.dtype)
        right = jax.ShapeDtypeStruct((*stack, rank, *spec.out_shape), spec.dtype)
        boxes[path] = LowRankKernel(left, right, layout=spec.layout)  # pyright: ignore[reportArgumentType]
    return plan_emulator(set_leaves(asked.base.params, boxes))


def _entry(asked: Emulation, spec: KernelSpec, ranks: Ranks, files: list[ArraysFile]) -> Any:
    rank = ranks.get(spec.path)
    if rank is None:
        return kernel_report(spec, None, others=asked.others)
    errors = [file.read(f"{inner}:errors") for file, inner in _places(asked, files, spec.path)]
    return kernel_report(spec, rank, _stacked(asked, files, spec.path, "squares"), errors)


def _fingerprint(asked: Emulation, files: list[ArraysFile]) -> str | None:
    if asked.weighting == "plain":
        return None
    samples = []
    for path, spec in asked.kernels.items():
        places = _places(asked, files, path)
        d_in, d_out = spec.d_in, spec.d_out
        shapes = {
            "sum": (d_in, d_in),
            "sum.through": (d_out, d_out),
            "sum.diagonal": (d_in,),
            "count": (),
            "gradient": (d_out, d_out),
            "gradient.through": (d_in, d_in),
            "gradient.diagonal": (d_out,),
        }
        for field, shape in shapes.items():  # those that were measured
            names = [f"{inner}:{field}:sample" for _, inner in places]
            if names[0] not in places[0][0]:
                continue
            name = f"{jax.tree_util.keystr((DictKey(path),))}.{field}"
            sample = b"".join(
                file.read(n).tobytes() for (file, _), n in zip(places, names, strict=True)
            )
            samples.append(StackedSample(name, "float32", (*spec.stack_shape, *shape), sample))
    return stacked_fingerprint(samples)


def _files(asked: Emulation, work: WorkingFolder, kind: str) -> list[ArraysFile]:
    return [ArraysFile(work / kind / f"{i:05d}.safetensors") for i in range(asked.num_blocks)]


def _places(asked: Emulation, files: list[ArraysFile], path: str) -> list[tuple[ArraysFile, str]]:
    """The blocks' files that hold a kernel, in order, and its name there."""
    if asked.scanned:
        return [(file, path.removeprefix("layers/")) for file in files]
    _, index, inner = path.split("/", 2)
    return [(files[int(index)], inner)]


def _stacked(asked: Emulation, files: list[ArraysFile], path: str, field: str) -> np.ndarray:
    parts = [file.read(f"{inner}:{field}") for file, inner in _places(asked, files, path)]
    return np.stack(parts) if asked.scanned else parts[0]


def _parts(asked: Emulation, path: str) -> Iterator[str]:
    """The unrolled paths of a parameter."""
    if not (asked.scanned and path.startswith("layers/")):
        yield path
        return
    for index in range(asked.num_blocks):
        yield f"layers/{index}/{path.removeprefix('layers/')}"
