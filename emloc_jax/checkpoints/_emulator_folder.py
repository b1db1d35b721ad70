"""Emulators on disk: factors of the compressed kernels, and all other parameters as they are.

The folder is self-contained: it opens at the emulator's size and without the base, whose identity
it carries. `emulator.safetensors` holds a compressed kernel as `<path>/left` and `<path>/right`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax._files import new_directory
from emloc_jax.checkpoints._dtypes import NUMPY_DTYPES, all_finite
from emloc_jax.checkpoints._emulator_config import EmulatorConfig
from emloc_jax.checkpoints._emulator_plan import EmulatorPlan, plan_emulator
from emloc_jax.checkpoints._fingerprint import base_fingerprint
from emloc_jax.checkpoints._hf_check import listed
from emloc_jax.checkpoints._hf_read import nest
from emloc_jax.checkpoints._layers import is_scanned
from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.checkpoints._safetensors_read import SafetensorsSource
from emloc_jax.checkpoints._safetensors_write import (
    Pieces,
    planned_bytes,
    write_safetensors,
)
from emloc_jax.emulator import CompressionReport
from emloc_jax.errors import CheckpointError, NonFiniteError
from emloc_jax.kernels import LowRankKernel

__all__ = ["emulator_config", "load_emulator", "open_emulator", "save_emulator", "write_emulator"]

WEIGHTS, CONFIG, _REPORT = "emulator.safetensors", "emulator_config.json", "report.json"


def save_emulator(
    folder: str | os.PathLike,
    emulator: Mapping[str, Any],
    report: CompressionReport | None = None,
    *,
    base: Pretrained | str | os.PathLike | Mapping[str, Any],
    rules: Any = None,
    weighting: str | None = None,
    calibration: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an emulator to a new folder.

    Args:
      folder: a new folder.
      emulator: parameter tree whose compressed kernels are `LowRankKernel` boxes.
      report: what `compress` said, kept as `report.json`; or None.
      base: the model it was made from, as for `base_fingerprint`.
      rules: what decided the ranks, as JSON.
      weighting: how the factorisation was weighted; None: as the report says.
      calibration: `calibration_fingerprint(moments)`.
      seed: of the calibration data.
      overwrite: replace an existing folder, once the new one is complete.

    Returns:
      The folder's absolute path.

    Raises:
      OutputExistsError: the folder exists.
      CheckpointError: a leaf is neither a floating array nor a `LowRankKernel`, or the disk is
        full.
      NonFiniteError: a leaf has infinite or NaN entries.

    >>> import tempfile
    >>> base = {"up": {"kernel": jnp.ones((4, 6))}}
    >>> emulator = {"up": {"kernel": LowRankKernel(jnp.ones((4, 1)), jnp.ones((1, 6)))}}
    >>> with tempfile.TemporaryDirectory() as home:
    ...     folder = save_emulator(home + "/emulator", emulator, base=base)
    ...     load_emulator(folder, base)["up"]["kernel"].rank
    1
    """
    plan = plan_emulator(emulator)
    config = emulator_config(
        plan,
        base=base,
        rules=rules,
        weighting=report.weighting if weighting is None and report else weighting,
        calibration=calibration,
        seed=seed,
    )
    with new_directory(folder, overwrite, needs=planned_bytes(plan.tensors)) as partial:
        write_emulator(partial, plan, lambda path: np.asarray(plan.arrays[path]), config, report)
    return Path(folder).absolute()


def emulator_config(
    plan: EmulatorPlan,
    *,
    base: Pretrained | str | os.PathLike | Mapping[str, Any],
    rules: Any,
    weighting: str | None,
    calibration: str | None,
    seed: int | None,
) -> EmulatorConfig:
    """What an emulator of this plan was made from and how; see `save_emulator`."""
    name = base.source if isinstance(base, Pretrained) else base
    return EmulatorConfig(
        base="" if isinstance(name, Mapping) else str(name),
        base_fingerprint=base_fingerprint(base),
        ranks=plan.ranks,
        layouts=plan.layouts,
        rules=rules,
        weighting=weighting,
        calibration_fingerprint=calibration,
        seed=seed,
    )


def write_emulator(
    folder: Path,
    plan: EmulatorPlan,
    read: Callable[[str], Pieces],
    config: EmulatorConfig,
    report: CompressionReport | None,
) -> None:
    """Writes an emulator's files into an empty folder of `new_directory`.

    Args:
      folder: where.
      plan: what there is.
      read: gives an array by its name, or its slices along the first axis one by one.
      config: goes beside the arrays.
      report: likewise, if there is one.
    """
    write_safetensors(folder / WEIGHTS, plan.tensors, read)
    config.write(folder / CONFIG)
    if report is not None:
        report.save(folder / _REPORT)


def load_emulator(
    folder: str | os.PathLike,
    base: Pretrained | str | os.PathLike | Mapping[str, Any] | None,
    *,
    abstract: bool = False,
) -> dict[str, Any]:
    """Read an emulator's parameter tree, at the emulator's size; the base's kernels are not read.

    Args:
      folder: written by `save_emulator`.
      base: the model it must have been made from; None: whatever it was made from.
      abstract: give `jax.ShapeDtypeStruct`s for the arrays, to plan with.

    Raises:
      CheckpointError: a file is missing, truncated or corrupt, factors are missing or do not fit
        their config, or the emulator was made from another base.
      NonFiniteError: a leaf has infinite or NaN entries.
    """
    folder = Path(folder)
    source, config = open_emulator(folder, base)
    infinite = []

    def read(name: str) -> Any:
        info = source.tensors[name]
        if abstract:
            return jax.ShapeDtypeStruct(info.shape, NUMPY_DTYPES[info.dtype])
        array = source.read(name)
        if not all_finite(array):
            infinite.append(name)
        return jnp.asarray(array)

    leaves: dict[str, Any] = {}
    for name in source.tensors:
        path, _, side = name.rpartition("/")
        if path not in config.ranks:
            leaves[name] = read(name)
        elif side == "left":
            right = read(f"{path}/right")
            leaves[path] = LowRankKernel(read(name), right, layout=config.layouts[path])
    if infinite:
        raise NonFiniteError(
            f"The emulator in {folder} has infinite or NaN entries at:\n{listed(infinite)}\n"
            "Make it again."
        )
    if isinstance(base, Pretrained) and is_scanned(leaves) != base.model.scan_layers:
        kind = "stacked" if is_scanned(leaves) else "separate"
        raise CheckpointError(
            f"The emulator in {folder} has {kind} layers and the model "
            f"scan_layers={base.model.scan_layers}. Load the model with "
            f"scan_layers={is_scanned(leaves)}."
        )
    return nest(leaves)


def open_emulator(
    folder: Path, base: Pretrained | str | os.PathLike | Mapping[str, Any] | None
) -> tuple[SafetensorsSource, EmulatorConfig]:
    """An emulator's arrays, opened but not read, and its config; see `load_emulator`."""
    config = EmulatorConfig.read(folder / CONFIG)
    if base is not None and base_fingerprint(base) != config.base_fingerprint:
        name = base.source if isinstance(base, Pretrained) else "the base given"
        raise CheckpointError(
            f"The emulator in {folder} was made from {config.base!r}, whose weights are not those "
            f"of {name}. Give that base, or make an emulator of this one."
        )
    source = SafetensorsSource([folder / WEIGHTS])
    _check(source, config, folder)
    return source, config


def _check(source: SafetensorsSource, config: EmulatorConfig, folder: Path) -> None:
    """Both factors of every compressed kernel are there, and of the rank the config says."""
    problems = []
    for path, rank in config.ranks.items():
        left, right = (source.tensors.get(f"{path}/{side}") for side in ("left", "right"))
        if left is None or right is None:
            problems.append(f"{path}: {'left' if left is None else 'right'} is missing")
            continue
        stack = len(left.shape) - 1 - config.layouts[path].num_in
        if stack < 0 or left.shape[-1] != rank or right.shape[stack : stack + 1] != (rank,):
            problems.append(f"{path}: rank {rank}, but left {left.shape}, right {right.shape}")
        elif path in source.tensors:
            problems.append(f"{path}: stored both whole and as factors")
    if problems:
        raise CheckpointError(
            f"The emulator in {folder} is incomplete:\n{listed(problems)}\nMake it again."
        )
