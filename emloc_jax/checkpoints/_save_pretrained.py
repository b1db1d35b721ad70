"""A whole model as a Hugging Face folder that torch `transformers` loads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emloc_jax._files import new_directory
from emloc_jax.checkpoints._dtypes import WORDS
from emloc_jax.checkpoints._gguf_source import GgufSource
from emloc_jax.checkpoints._hf_check import EMBEDDING, HEAD, listed
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
from emloc_jax.errors import CheckpointError
from emloc_jax.models import DecoderConfig, HfTensor, hf_tensor_names

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
    and generation files are copied. From a GGUF base a folder with Hugging Face's standard names is
    made. A tied head is not written twice. Tensors are written one at a time; boxed kernels are
    turned into arrays on the way, so `attach(params, adapters)` is merged without a second copy.

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
    source, _ = open_source(like.source)
    leaves = layer_leaves(params)
    names = _match(leaves, like.config)
    if isinstance(source, GgufSource):
        shards = plan_shards(_standard_plans(names, leaves, wanted), _SHARD)
    else:
        shards = _base_plans(source, names, wanted)

    def read(name: str) -> np.ndarray:
        if name == HEAD and like.config.tie_embeddings:
            name = EMBEDDING
        if name not in names:
            return source.read(name)  # a buffer of the base that no parameter stands for
        path, tensor = names[name]
        array = leaves[path].array()
        return array.T if tensor.transpose else array

    def metadata(shard: str) -> Mapping[str, str]:
        base = {} if isinstance(source, GgufSource) else source.metadata[like.source / shard]
        return {"format": "pt"} | base

    needs = planned_bytes([plan for plans in shards.values() for plan in plans])
    with new_directory(folder, overwrite, needs=needs) as partial:
        write_sharded(partial, shards, read, metadata)
        if isinstance(source, GgufSource):
            stored = shards[next(iter(shards))][0].dtype
            write_gguf_side_files(source, partial, _DTYPE_NAMES[stored])
        else:
            copy_side_files(like.source, partial, None if wanted is None else str(wanted))
    return Path(folder).absolute()


_DTYPE_NAMES = {word: str(dtype) for dtype, word in WORDS.items()}


def _match(
    leaves: Mapping[str, LayerLeaf], config: DecoderConfig
) -> dict[str, tuple[str, HfTensor]]:
    """HF name -> (path, tensor), once the tree is known to have exactly the model's leaves."""
    wanted = hf_tensor_names(config)
    problems = [f"missing: {path}" for path in wanted if path not in leaves]
    problems += [f"unexpected: {path}" for path in leaves if path not in wanted]
    for path in wanted.keys() & leaves.keys():
        tensor, shape = wanted[path], leaves[path].shape
        fits = tensor.shape[::-1] if tensor.transpose else tensor.shape
        if shape != fits:
            problems.append(f"wrong shape: {path} is {shape}, the model has {fits}")
    if problems:
        raise CheckpointError(
            f"These parameters are not a whole model ({config.model_type}, {config.num_layers} "
            f"layers):\n{listed(problems)}\nGive the full tree of the model given as `like`."
        )
    return {tensor.name: (path, tensor) for path, tensor in wanted.items()}


def _base_plans(
    source: SafetensorsSource, names: Mapping[str, Any], dtype: np.dtype | None
) -> dict[str, list[TensorPlan]]:
    """The base's own files and tensors."""
    shards: dict[str, list[TensorPlan]] = {file.name: [] for file in source.files}
    for name, info in source.tensors.items():
        known = name in names or name == HEAD
        word = WORDS[dtype] if dtype is not None and known else info.dtype
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
