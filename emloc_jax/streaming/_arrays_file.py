"""Named arrays in one file, whole or not at all, read back one at a time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from emloc_jax._files import new_file
from emloc_jax.errors import CheckpointError

__all__ = ["ArraysFile", "write_arrays"]

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
}


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
            with safe_open(self._path, framework="np") as file:  # checks that it is whole
                self.note = json.loads(file.metadata()["note"])
            with open(self._path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._header = json.loads(file.read(size))
            self._start = 8 + size
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} is missing or damaged ({error}). Delete the unfinished work that it "
                "belongs to, and start again."
            ) from error

    def __iter__(self):
        return iter(name for name in self._header if name != "__metadata__")

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def read(self, name: str) -> np.ndarray:
        """One array; it is read, not mapped, so that nothing of the file stays in memory."""
        entry = self._header[name]
        low, high = entry["data_offsets"]
        data = np.fromfile(self._path, np.uint8, count=high - low, offset=self._start + low)
        return data.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
