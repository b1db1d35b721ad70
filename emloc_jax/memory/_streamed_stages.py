"""Stages that read the original a block at a time: the programs of room streaming, on shapes."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from emloc_jax._program_memory import ProgramMemory
from emloc_jax.adapters import CANDIDATES, Adapter, limits_to_try
from emloc_jax.emulator import Taps
from emloc_jax.kernels import flatten_leaves
from emloc_jax.memory._abstract_emulator import (
    abstract_adapters,
    abstract_emulator,
    compressed,
    selected,
)
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._setting import Setting
from emloc_jax.memory._stage import Program, Stage, tree_bytes
from emloc_jax.memory._target import Target
from emloc_jax.models import layer_depths
from emloc_jax.streaming import (
    BlockShapes,
    LayerKernels,
    StreamedModel,
    block_adapters,
    block_shapes,
    calibration_programs,
    correction_programs,
    factor_bytes,
    factorization_programs,
    layer_kernels,
    loss_programs,
    merge_programs,
    streamed_model,
    trial_bytes,
)

__all__ = [
    "streamed_calibration",
    "streamed_correction",
    "streamed_evaluation",
    "streamed_factorization",
    "streamed_merging",
    "tensor_written",
]


def streamed_calibration(
    abstract: AbstractModel, setting: Setting, target: Target
) -> Iterator[Stage]:
    """All calibration rows through one block after the other; see `stream_emulator`.

    Two-sided, the inputs of all blocks wait for the way back; gradients, and one-sided inputs, are
    written to files, of two blocks at a time.
    """
    with target.lowering():
        model, shapes = _parts(abstract, setting, setting.calibration_batch)
        taps = _taps(abstract, setting)
        programs = calibration_programs(model, shapes, taps)
    rows = _rows(shapes, setting.calibration_batch, setting.calibration_rows)
    kept, spilled = _spilled(rows * (shapes.count if setting.gradients else 1), setting)
    yield Stage(
        "calibrate",
        "emloc",
        programs,
        host={"activations": kept},
        disk={"activations": spilled + 2 * rows},
    )


def streamed_factorization(
    abstract: AbstractModel, setting: Setting, target: Target
) -> Iterator[Stage]:
    """The kernels of a block, one after the other, while all of its second moments are there."""
    layer, ranks = _factored(abstract, setting)
    with target.lowering():
        _, shapes = _parts(abstract, setting, setting.calibration_batch)
        taps = _taps(abstract, setting)
        programs = factorization_programs(shapes, taps, layer.specs, ranks)
    factors = factor_bytes(layer.specs, ranks)
    rows = _rows(shapes, setting.calibration_batch, setting.calibration_rows)
    kept, spilled = _spilled(rows * (shapes.count if setting.gradients else 1), setting)
    host = {"activations": kept}
    if target.platform != "cpu":  # the fingerprint reads them there
        host["moments"] = tree_bytes(jax.eval_shape(taps.zeros))
    disk = {
        "activations": spilled + 2 * rows,
        "factors": shapes.count * factors,
        "emulator": tree_bytes(abstract_emulator(abstract, setting)),
    }
    yield Stage("factorize", "emloc", programs, host=host, disk=disk)


def streamed_correction(
    abstract: AbstractModel, setting: Setting, target: Target
) -> Iterator[Stage]:
    """One kernel of one layer after the other; before that, the losses of all limits.

    Weighted, the calibration rows walk through the blocks once more for each of the two, and the
    kernels of a block are corrected while its second moments are there.
    """
    adapters = abstract_adapters(abstract, setting)
    moments = None
    if setting.weighted:
        with target.lowering():
            model, shapes = _parts(abstract, setting, setting.calibration_batch)
            count = abstract.model.config.num_layers
            kernels = {path: abstract.kernels[path] for path in adapters}
            specs = layer_kernels(kernels, count, scanned=True)[0].specs
            taps = Taps(specs, moments="full")
            programs = calibration_programs(model, shapes, taps)
        moments = tree_bytes(jax.eval_shape(taps.zeros))
        rows = _rows(shapes, setting.calibration_batch, setting.calibration_rows)
        kept, spilled = _spilled(rows, setting)
        disk = {"activations": spilled + 2 * rows}
        host = {"activations": kept}
        yield Stage("weigh the correction", "emloc", programs, host=host, disk=disk)
    emulator = flatten_leaves(abstract_emulator(abstract, setting))
    read = {"kernel as read": 2 * max(_layer_bytes(abstract, path) for path in adapters)}
    if setting.choose_limit:
        with target.lowering():
            model, shapes = _parts(abstract, setting, setting.calibration_batch)
            programs = loss_programs(model, shapes, _of_block(adapters), trial_bytes(adapters))
        rows = _rows(shapes, setting.calibration_batch, setting.calibration_rows)
        kept, spilled = _spilled(rows * len(limits_to_try(CANDIDATES)), setting)
        disk = {"activations": spilled}
        yield Stage("choose limit", "emloc", programs, host={"activations": kept}, disk=disk)
    with target.lowering():
        programs = correction_programs(adapters, abstract.kernels, emulator, moments=moments)
    yield Stage("correct", "emloc", programs, host=read)


def streamed_merging(
    abstract: AbstractModel, setting: Setting, target: Target, method: str = "emloc"
) -> Iterator[Stage]:
    """Adding one kernel's adapter to it at a time, and writing one tensor at a time."""
    adapters = abstract_adapters(abstract, setting)
    with target.lowering():
        programs = merge_programs(adapters, abstract.kernels)
    programs["write"] = tensor_written(abstract)
    yield Stage(
        "merge",
        method,
        programs,
        disk={"merged model": tree_bytes(abstract.params)},
    )


def streamed_evaluation(
    abstract: AbstractModel, setting: Setting, target: Target, method: str = "emloc"
) -> Iterator[Stage]:
    """The loss of the original with adapters on the test rows, all through one block at a time."""
    adapters = abstract_adapters(abstract, setting)
    with target.lowering():
        model, shapes = _parts(abstract, setting, setting.eval_batch)
        beside = {"adapters": tree_bytes(adapters)}
        programs = loss_programs(model, shapes, _of_block(adapters), beside)
    kept, spilled = _spilled(_rows(shapes, setting.eval_batch, setting.eval_rows), setting)
    disk = {"activations": spilled}
    yield Stage("evaluate", method, programs, host={"activations": kept}, disk=disk)


def tensor_written(abstract: AbstractModel) -> Program:
    """The writing of the largest tensor, one layer of a stack: as it is, and as it is stored."""
    depths = layer_depths(abstract.model.config)
    sizes = [
        tree_bytes(leaf)
        // next((n for kind, n in depths.items() if path.startswith(kind + "/")), 1)
        for path, leaf in flatten_leaves(abstract.params).items()
    ]
    largest = max(sizes)
    return Program(ProgramMemory(0, 0, 0, 0), host={"tensor as written": 2 * largest})


def _parts(
    abstract: AbstractModel, setting: Setting, rows: int
) -> tuple[StreamedModel, BlockShapes]:
    model = streamed_model(abstract.model, chunk=setting.chunk)
    return model, block_shapes(model, abstract.params, setting.batch(rows))


def _layer(abstract: AbstractModel, setting: Setting) -> LayerKernels:
    """The kernels of a block that calibration measures."""
    kernels = selected(abstract, setting.where)
    return layer_kernels(kernels, abstract.model.config.num_layers, scanned=True)[0]


def _taps(abstract: AbstractModel, setting: Setting) -> Taps:
    return Taps(
        _layer(abstract, setting).specs, gradients=setting.gradients, moments=setting.moment_form
    )


def _factored(abstract: AbstractModel, setting: Setting) -> tuple[LayerKernels, dict[str, int]]:
    """The kernels of a block that get a rank, and their ranks."""
    layer, ranks = _layer(abstract, setting), compressed(abstract, setting)
    own = {name: ranks[path] for name, path in layer.paths.items() if path in ranks}
    specs = {name: spec for name, spec in layer.specs.items() if name in own}
    return LayerKernels(layer.index, specs, layer.paths), own


def _of_block(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    return jax.eval_shape(lambda tree: block_adapters(tree, 0), dict(adapters))


def _rows(shapes: BlockShapes, batch: int, rows: int) -> int:
    """Bytes of the inputs of one block, of all rows."""
    return tree_bytes(shapes.x) * -(-rows // batch)


def _spilled(size: int, setting: Setting) -> tuple[int, int]:
    """What of some activations lies on the host, and what in files."""
    kept = size if setting.activations is None else min(size, setting.activations)
    return kept, size - kept


def _layer_bytes(abstract: AbstractModel, path: str) -> int:
    """Bytes of one layer of a kernel."""
    spec = abstract.kernels[path]
    return spec.d_in * spec.d_out * np.dtype(spec.dtype).itemsize
