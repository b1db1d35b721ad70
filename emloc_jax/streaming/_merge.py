"""A merged model written from a base that is read one tensor at a time."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import Adapter, Trainable, attach, fitting_leaves, lora_alone
from emloc_jax.checkpoints import (
    CheckpointBlocks,
    LazyLeaf,
    Pretrained,
    base_fingerprint,
    layer_leaves,
    pretrained_files,
)
from emloc_jax.kernels import materialize
from emloc_jax.streaming._layer_adapters import split_adapter
from emloc_jax.streaming._working import WorkingFolder

__all__ = ["stream_merge"]


def stream_merge(
    output: str | os.PathLike,
    base: Pretrained,
    adapters: Mapping[str, Trainable] | None = None,
    *,
    dtype: Any = None,
    resume: bool = False,
    on_shard: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the base with adapters added in as a Hugging Face folder, one tensor at a time.

    The folder is that of `save_pretrained(output, attach(params, adapters), like=base)`, byte for
    byte. Finished shards are kept in `.NAME.partial-merge` beside the output until it is whole.

    Args:
      output: a new folder.
      base: the original model, best loaded with `abstract=True`.
      adapters: to merge; None: write the base as it is.
      dtype: of the stored tensors; None: as in the base.
      resume: go on with what a killed run left; if there is nothing, start.
      on_shard: called with the number of shards done and of all.

    Returns:
      The folder's absolute path.

    Raises:
      OutputExistsError, ResumeError: see `stream_emulator`.
      AdapterMismatchError: an adapter fits no kernel, or a parameter was trained whole.
      CheckpointError, NonFiniteError: see `save_pretrained`; finished shards stay.
    """
    lora = lora_alone({} if adapters is None else adapters, "A streamed merge")
    fitting_leaves(base.params, lora)  # refuses those that do not fit
    source = CheckpointBlocks(base)
    own = {part: one for path, a in lora.items() for part, one in split_adapter(path, a)}

    def read(path: str) -> np.ndarray:
        array = source.parameter(path)
        if path not in own:
            return array
        boxed = attach({"kernel": jnp.asarray(array)}, {"kernel": own[path]})
        return np.asarray(materialize(boxed)["kernel"])

    leaves = {
        path: LazyLeaf(leaf.shape, leaf.dtype, lambda path=path: read(path))
        for path, leaf in layer_leaves(base.params).items()
    }
    files = pretrained_files(leaves, base, dtype)
    identity = {
        "format": 1,
        "base": base_fingerprint(base),
        "dtypes": sorted({str(leaf.dtype) for leaf in leaves.values()}),
        "stored": None if dtype is None else str(np.dtype(dtype)),
        "adapters": _digest(own),
    }
    work = WorkingFolder(output, "merge", identity, resume=resume)
    if not work.complete:
        files.write(work / "model", on_shard)
        work.hand_over(work / "model")
    else:
        work.remove()
    return work.output


def _digest(adapters: Mapping[str, Adapter]) -> str:
    digest = hashlib.sha256()
    for path in sorted(adapters):
        one = adapters[path]
        digest.update(f"{path}|{one.scale}|{one.layout}|{one.kernel_shape}|".encode())
        for factor in (one.lora_a, one.lora_b):
            digest.update(np.asarray(factor).tobytes())
    return digest.hexdigest()
