"""A whole model as a Hugging Face folder that torch `transformers` loads."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emloc_jax._files import new_directory, new_file
from emloc_jax.checkpoints._dtypes import WORDS
from emloc_jax.checkpoints._gguf_source import GgufSource
from emloc_jax.checkpoints._hf_check import listed
from emloc_jax.checkpoints._hf_files import copy_side_files, write_gguf_side_files
from emloc_jax.checkpoints._hf_read import parameter_dtype
from emloc_jax.checkpoints._layers import LayerLeaf, LazyLeaf, layer_leaves
from emloc_jax.checkpoints._pretrained import Pretrained, open_source
from emloc_jax.checkpoints._safetensors_read import SafetensorsSource
from emloc_jax.checkpoints._safetensors_write import (
    TensorPlan,
    plan_shards,
    planned_bytes,
    write_index,
    write_safetensors,
)
from emloc_jax.checkpoints._stored_names import stored_names
from emloc_jax.errors import CheckpointError
from emloc_jax.models import HfTensor, hf_storage, hf_tensor_names

__all__ = ["PretrainedFiles", "pretrained_files", "save_pretrained"]

Leaves = Mapping[str, LayerLeaf] | Mapping[str, LazyLeaf]

_SHARD = 5 * 10**9


def save_pretrained(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    *,
    like: Pretrained,
    dtype: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write parameters as a Hugging Face folder of the same model as `like`.

    Names, types and division into shards are those of the base folder, and its config, tokenizer
    and generation files are copied; a `like.hf_config` with other entries (names of labels, say)
    replaces the config. From a GGUF base, and where a head was made afresh, a folder
    with Hugging Face's standard names is made, and a config for it. A tied head is not written
    twice. Tensors are written one at a time; boxed kernels are turned into arrays on the way, so
    `attach(params, adapters)` is merged without a second copy.

    Args:
      folder: a new folder.
      params: the whole tree, unrolled or scanned; boxes count as the arrays they stand for.
      like: the base, whose `source` must still be there.
      dtype: of the stored tensors; None: as in the base (from GGUF: as in `params`).
      overwrite: replace an existing folder, once the new one is complete.

    Returns:
      The folder's absolute path.

    Raises:
      OutputExistsError: the folder exists.
      CheckpointError: parameters are missing, unexpected or of a wrong shape, or the disk is full.
      NonFiniteError: a parameter has infinite or NaN entries.
    """
    files = pretrained_files(layer_leaves(params), like, dtype)
    with new_directory(folder, overwrite, needs=files.nbytes) as partial:
        files.write(partial)
    return Path(folder).absolute()


@dataclasses.dataclass(frozen=True)
class PretrainedFiles:
    """The files of a model's folder, before they are written.

    Attributes:
      shards: the tensors of each weights file.
      read: gives a tensor by its name.
      metadata: of each weights file.
      finish: writes the files that are no weights into a folder.
    """

    shards: dict[str, list[TensorPlan]]
    read: Callable[[str], np.ndarray]
    metadata: Callable[[str], Mapping[str, str]]
    finish: Callable[[Path], None]

    @property
    def nbytes(self) -> int:
        """Bytes that will be written, with a guess for the headers."""
        return planned_bytes([plan for plans in self.shards.values() for plan in plans])

    def write(self, folder: Path, on_shard: Callable[[int, int], None] | None = None) -> None:
        """Writes all files into a folder, but for weights files that are there already.

        Every weights file appears whole or not at all, so a killed process can be gone on with.

        Args:
          folder: of this model alone.
          on_shard: called with the number of weights files done and of all.
        """
        for unfinished in folder.glob(".*.partial-*"):  # of a process that was killed
            unfinished.unlink()
        there = [shard for shard in self.shards if (folder / shard).is_file()]
        left = [
            plan for shard, plans in self.shards.items() if shard not in there for plan in plans
        ]
        for number, (shard, plans) in enumerate(self.shards.items(), 1):
            if shard not in there:
                with new_file(folder / shard, needs=planned_bytes(left)) as partial:
                    write_safetensors(partial, plans, self.read, self.metadata(shard))
                del left[: len(plans)]
            if on_shard is not None:
                on_shard(number, len(self.shards))
        write_index(folder, self.shards)
        self.finish(folder)


def pretrained_files(leaves: Leaves, like: Pretrained, dtype: Any = None) -> PretrainedFiles:
    """What `save_pretrained` writes, of parameters that may be read one at a time.

    Args:
      leaves: every parameter by its unrolled path.
      like: see `save_pretrained`.
      dtype: see `save_pretrained`.

    Raises:
      CheckpointError: see `save_pretrained`.
    """
    wanted = parameter_dtype(dtype)
    source, found = open_source(like.source)
    names = _match(leaves, like.config)
    # A GGUF base has other names, and the base's own files have no place for a new head.
    base = None if isinstance(source, GgufSource) or like.fresh else source
    if base is None:
        shards = plan_shards(_standard_plans(names, leaves, wanted), _SHARD)
    else:
        names = _as_stored(names, base, like.config)
        shards = _base_plans(base, names, wanted)

    def read(name: str) -> np.ndarray:
        if name not in names:
            return source.read(name)  # a buffer or another head that no parameter stands for
        path, tensor = names[name]
        return tensor.to_stored(leaves[path].array())

    def metadata(shard: str) -> Mapping[str, str]:
        kept = {} if base is None else base.metadata[like.source / shard]
        return {"format": "pt"} | kept

    def finish(folder: Path) -> None:
        if base is not None:
            changed = None if like.hf_config == found else like.hf_config
            copy_side_files(like.source, folder, None if wanted is None else str(wanted), changed)
            return
        stored = _DTYPE_NAMES[shards[next(iter(shards))][0].dtype]
        if isinstance(source, GgufSource):
            write_gguf_side_files(source, folder, stored)
        else:
            copy_side_files(like.source, folder, stored, like.hf_config)

    return PretrainedFiles(shards, read, metadata, finish)


_DTYPE_NAMES = {word: str(dtype) for dtype, word in WORDS.items()}


def _match(leaves: Leaves, config: Any) -> dict[str, tuple[str, HfTensor]]:
    """HF name -> (path, tensor), once the tree is known to have exactly the model's leaves."""
    wanted = hf_tensor_names(config)
    problems = [f"missing: {path}" for path in wanted if path not in leaves]
    problems += [f"unexpected: {path}" for path in leaves if path not in wanted]
    for path in wanted.keys() & leaves.keys():
        fits, shape = wanted[path].parameter_shape, leaves[path].shape
        if shape != fits:
            problems.append(f"wrong shape: {path} is {shape}, the model has {fits}")
    if problems:
        raise CheckpointError(
            f"These parameters are not a whole model ({config.model_type}, {config.num_layers} "
            f"layers):\n{listed(problems)}\nGive the full tree of the model given as `like`."
        )
    return {tensor.name: (path, tensor) for path, tensor in wanted.items()}


def _as_stored(
    names: Mapping[str, tuple[str, HfTensor]], source: SafetensorsSource, config: Any
) -> dict[str, tuple[str, HfTensor]]:
    """The same under the base's own names, and copies of tied tensors under theirs."""
    storage = hf_storage(config)
    stored = stored_names(source.tensors, storage)
    return {stored[name]: entry for name, entry in names.items()} | {
        copy: names[of] for copy, of in storage.copies.items()
    }


def _base_plans(
    source: SafetensorsSource, names: Mapping[str, Any], dtype: np.dtype | None
) -> dict[str, list[TensorPlan]]:
    """The base's own files and tensors."""
    shards: dict[str, list[TensorPlan]] = {file.name: [] for file in source.files}
    for name, info in source.tensors.items():
        word = WORDS[dtype] if dtype is not None and name in names else info.dtype
        shards[info.file.name].append(TensorPlan(name, word, info.shape))
    return shards


def _standard_plans(
    names: Mapping[str, tuple[str, HfTensor]],
    leaves: Leaves,
    dtype: np.dtype | None,
) -> list[TensorPlan]:
    """Every tensor of the model under its Hugging Face name, in model order."""
    embedding = next(path for path, _ in names.values())  # the first, see `parameter_shapes`
    stored = dtype or leaves[embedding].dtype
    return [TensorPlan(name, WORDS[stored], tensor.shape) for name, (_, tensor) in names.items()]
