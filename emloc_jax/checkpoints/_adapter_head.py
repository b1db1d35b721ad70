"""A head that was trained whole, in the folder of an adapter: PEFT's `modules_to_save`."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import Whole
from emloc_jax.checkpoints._dtypes import all_finite
from emloc_jax.checkpoints._head_parts import head_tensors, saved_module, saved_tensors
from emloc_jax.checkpoints._hf_check import listed
from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.checkpoints._safetensors_read import SafetensorsSource
from emloc_jax.checkpoints._safetensors_write import TensorPlan
from emloc_jax.errors import AdapterMismatchError, NonFiniteError

__all__ = ["AdapterHead", "HeadFiles", "adapter_head", "head_files", "read_head"]

PREFIX = "base_model.model."
_METADATA = "emloc_jax.head"
_BIAS = re.compile(rf"{re.escape(PREFIX)}classifier\.(out_proj\.)?bias")


class AdapterHead(NamedTuple):
    """What an adapter folder says of the classification head in it.

    Attributes:
      outputs: of the head.
      labels: names of the classes, in order; empty where the file does not say them.
      problem_type: as `config.json` has it; None where the file does not say it.
    """

    outputs: int
    labels: tuple[str, ...] = ()
    problem_type: str | None = None


class HeadFiles(NamedTuple):
    """A head, ready to be written beside the factors.

    Attributes:
      modules: `modules_to_save`.
      plans: its fp32 tensors, as PEFT names them.
      read: gives a tensor by its name.
      metadata: for the header.
    """

    modules: list[str]
    plans: list[TensorPlan]
    read: Callable[[str], np.ndarray]
    metadata: dict[str, str]


def head_files(whole: Mapping[str, Whole], base: Pretrained) -> HeadFiles:
    """What is written of parameters that were trained whole.

    Args:
      whole: {path: Whole}, perhaps none.
      base: the classifier that they belong to.

    Raises:
      AdapterMismatchError: a parameter is no part of a head, has another shape than the base's,
        or its module was trained in part; or a fresh parameter of the base is not among them.
    """
    tensors = head_tensors(base.config)
    modules = sorted({saved_module(tensors[path].class_name) for path in whole if path in tensors})
    problems = [f"{path}: no part of a classification head" for path in whole.keys() - tensors]
    for path, tensor in tensors.items():
        if path in whole and tuple(whole[path].value.shape) != tensor.parameter_shape:
            found = tuple(whole[path].value.shape)
            problems.append(f"{path}: {found}, the base has {tensor.parameter_shape}")
        elif path not in whole and saved_module(tensor.class_name) in modules:
            problems.append(f"{path}: missing, and PEFT saves its module as a whole")
        elif path not in whole and path in base.fresh:
            problems.append(f"{path}: missing, and it stands in no file, since it was made afresh")
    if problems:
        raise AdapterMismatchError(
            f"These adapters cannot be saved for {base.source}:\n{listed(problems)}\n"
            "Train all of its head whole: init_whole(params, where=head_parameters(base))."
        )
    names = {PREFIX + tensors[path].class_name: path for path in tensors if path in whole}

    def read(name: str) -> np.ndarray:
        path = names[name]
        return tensors[path].to_stored(np.asarray(whole[path].value, np.float32))

    plans = [TensorPlan(name, "F32", tensors[path].shape) for name, path in names.items()]
    return HeadFiles(modules, plans, read, _metadata(base) if whole else {})


def adapter_head(folder: str | os.PathLike) -> AdapterHead | None:
    """The classification head in an adapter folder, ours or PEFT's; None if there is none.

    Args:
      folder: of the adapter.

    Raises:
      CheckpointError: the file is missing or corrupt.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():  # diffusers' have none; what is missing is told when they are loaded
        return None
    source = SafetensorsSource([file])
    found = [info.shape[0] for name, info in source.tensors.items() if _BIAS.fullmatch(name)]
    if not found:
        return None
    said = json.loads(source.metadata[file].get(_METADATA, "{}"))
    return AdapterHead(found[0], tuple(said.get("labels", ())), said.get("problem_type"))


def read_head(
    source: SafetensorsSource, config: Any, modules: Iterable[str], folder: Path
) -> tuple[dict[str, Whole], set[str]]:
    """The parameters that an adapter has whole.

    Args:
      source: its file, open.
      config: of the base.
      modules: its `modules_to_save`.
      folder: for messages.

    Returns:
      {path: Whole} in fp32, and the names of their tensors.

    Raises:
      AdapterMismatchError: `modules_to_save` has more than a head that the base has, or a tensor
        is missing or of another shape.
      NonFiniteError: a parameter has infinite or NaN entries.
    """
    wanted, others = saved_tensors(config, modules)
    if others:
        has = sorted({saved_module(t.class_name) for t in head_tensors(config).values()})
        raise AdapterMismatchError(
            f"The adapter in {folder} has modules_to_save={list(modules)}, but of the base "
            f"({config.model_type}) {', '.join(has) or 'no module'} can be taken whole; "
            f"{', '.join(others)} cannot. Load an encoder with its classification head "
            "(num_labels=...), or merge the adapter with peft's merge_and_unload."
        )
    problems, infinite, whole = [], [], {}
    for path, tensor in wanted.items():
        name = PREFIX + tensor.class_name
        info = source.tensors.get(name)
        if info is None or info.shape != tensor.shape:
            found = "missing" if info is None else f"{info.shape}"
            problems.append(f"{name}: {found}, the base has {tensor.shape}")
            continue
        array = np.ascontiguousarray(tensor.to_parameter(source.read(name).astype(np.float32)))
        if not all_finite(array):
            infinite.append(name)
        whole[path] = Whole(jnp.asarray(array))
    if problems:
        raise AdapterMismatchError(
            f"The head in {folder} does not fit the base:\n{listed(problems)}\n"
            "Load the base that it was trained for, with as many labels."
        )
    if infinite:
        raise NonFiniteError(f"The head in {folder} has infinite or NaN entries at: {infinite}")
    return whole, {PREFIX + tensor.class_name for tensor in wanted.values()}


def _metadata(base: Pretrained) -> dict[str, str]:
    labels = base.hf_config.get("id2label") or {}
    names = [name for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    said: dict[str, Any] = {"labels": names, "problem_type": base.hf_config.get("problem_type")}
    return {_METADATA: json.dumps(said)}
