"""A whole model as a Hugging Face folder that torch `transformers` loads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emloc_jax._files import new_directory
from emloc_jax.checkpoints._dtypes import WORDS
from emloc_jax.checkpoints._gguf_source import GgufSource
from emloc_jax.checkpoints._hf_check import listed
from emloc_jax.checkpoints._hf_files import copy_side_files, write_gguf_side_files
from emloc_jax.checkpoints._hf_read import parameter_dtype
from emloc_jax.checkpoints._layers import LayerLeaf, layer_leaves
from emloc_jax.checkpoints._pretrained import Pretrained, open_source
from emloc_jax.checkpoints._safetensors_read import SafetensorsSource
from emloc_jax.checkpoints._safetensors_write import (
    TensorPlan,
    plan_shards,
    planned_bytes,
    write_sharded,
)
from emloc_jax.checkpoints._stored_names import stored_names
from emloc_jax.errors import CheckpointError
from emloc_jax.models import HfTensor, hf_storage, hf_tensor_names

__all__ = ["save_pretrained"]

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
    wanted = parameter_dtype(dtype)
    source, found = open_source(like.source)
    leaves = layer_leaves(params)
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
        array = leaves[path].array()
        return array.T if tensor.transpose else array

    def metadata(shard: str) -> Mapping[str, str]:
        kept = {} if base is None else base.metadata[like.source / shard]
        return {"format": "pt"} | kept

    needs = planned_bytes([plan for plans in shards.values() for plan in plans])
    with new_directory(folder, overwrite, needs=needs) as partial:
        write_sharded(partial, shards, read, metadata)
        if base is not None:
            changed = None if like.hf_config == found else like.hf_config
            copy_side_files(like.source, partial, None if wanted is None else str(wanted), changed)
        else:
            stored = _DTYPE_NAMES[shards[next(iter(shards))][0].dtype]
            if isinstance(source, GgufSource):
                write_gguf_side_files(source, partial, stored)
            else:
                copy_side_files(like.source, partial, stored, like.hf_config)
    return Path(folder).absolute()


_DTYPE_NAMES = {word: str(dtype) for dtype, word in WORDS.items()}


def _match(leaves: Mapping[str, LayerLeaf], config: Any) -> dict[str, tuple[str, HfTensor]]:
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
    leaves: Mapping[str, LayerLeaf],
    dtype: np.dtype | None,
) -> list[TensorPlan]:
    """Every tensor of the model under its Hugging Face name, in model order."""
    stored = dtype or leaves["embed_tokens/embedding"].dtype
    return [TensorPlan(name, WORDS[stored], tensor.shape) for name, (_, tensor) in names.items()]
