"""Named arrays of any dtype in one file, whole or not at all, read back one at a time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from emloc_jax._files import new_file
from emloc_jax.errors import CheckpointError

__all__ = ["ArraysFile", "write_arrays"]


def write_arrays(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], note: Any = None
) -> None:
    """Writes arrays and a JSON note, over an older file if there is one.

    Raises:
      CheckpointError: the disk is full, or the file cannot be written.
    """
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    needs = sum(tensor.nbytes + 256 for tensor in tensors.values())
    with new_file(path, overwrite=True, needs=needs) as partial:
        save_file(tensors, partial, metadata={"note": json.dumps(note)})


class ArraysFile:
    """What `write_arrays` wrote.

    Raises:
      CheckpointError: the file is missing or damaged.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as home:
      ...     write_arrays(home + "/x", {"ones": np.ones(2)}, note=[1])
      ...     file = ArraysFile(home + "/x")
      ...     file.read("ones"), file.note, list(file)
      (array([1., 1.]), [1], ['ones'])
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        try:
            self._file = safe_open(self._path, framework="np").__enter__()
            self.note = json.loads(self._file.metadata()["note"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} is missing or damaged ({error}). Delete the unfinished work that it "
                "belongs to, and start again."
            ) from error

    def __iter__(self):
        return iter(self._file.keys())

    def read(self, name: str) -> np.ndarray:
        """One array, copied out of the memory map."""
        return self._file.get_tensor(name)
