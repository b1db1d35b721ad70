"""Dictionaries of arrays in one safetensors file, with a JSON note saying what they are."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from emloc_jax._files import new_file
from emloc_jax.errors import CheckpointError

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(
    path: str | os.PathLike, kind: str, index: Any, arrays: Mapping[str, jax.Array]
) -> None:
    """Writes `arrays` and the JSON-able `index` to a new file, whole or not at all.

    Args:
      path: a new file.
      kind: what the file holds; `read_tensors` asks for the same word.
      index: how the arrays belong together.
      arrays: by any names.

    Raises:
      OutputExistsError: `path` exists.
    """
    tensors = {name: np.asarray(jax.device_get(a), order="C") for name, a in arrays.items()}
    needs = sum(tensor.nbytes + 256 for tensor in tensors.values())
    with new_file(path, needs=needs) as partial:
        save_file(tensors, partial, metadata={"emloc_jax": kind, "index": json.dumps(index)})


def read_tensors(path: str | os.PathLike, kind: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The index and the arrays that `write_tensors` wrote.

    Raises:
      CheckpointError: the file is missing, truncated, corrupt, or of another kind.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("emloc_jax") != kind:
                raise CheckpointError(
                    f"{path} holds no {kind} of emloc_jax (its metadata says "
                    f"{metadata.get('emloc_jax')!r}). Pass a file that was saved as such."
                )
            index = json.loads(metadata["index"])
            return index, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read {kind} from {path}: {error}. The file is missing, truncated or corrupt; "
            "make it again."
        ) from error
