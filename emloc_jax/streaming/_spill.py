"""Activations between blocks: in host memory up to a limit, beyond it in files."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emloc_jax.streaming._arrays_file import ArraysFile, write_arrays

__all__ = ["Spill"]

Key = tuple[str, int, int]


class Spill:
    """Arrays by (what, block, batch).

    Args:
      folder: for the files; made when the first is written.
      limit: bytes that may lie in host memory; None: no limit.

    Attributes:
      held: bytes that lie in host memory now.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as home:
      ...     spill = Spill(Path(home), limit=8)
      ...     spill.put(("x", 0, 0), np.ones(2, np.float32))
      ...     spill.put(("x", 0, 1), np.zeros(2, np.float32))
      ...     spill.held, len(list(Path(home).iterdir())), spill.get(("x", 0, 1))
      (8, 1, array([0., 0.], dtype=float32))
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self._folder, self._limit = folder, limit
        self._arrays: dict[Key, np.ndarray] = {}
        self.held = 0

    def put(self, key: Key, array: Any, *, durable: bool = False) -> None:
        """Keeps an array under a new key; `durable` ones go to a file, and outlive the process."""
        host = np.asarray(jax.device_get(array))
        fits = self._limit is None or self.held + host.nbytes <= self._limit
        if fits and not durable:
            self._arrays[key] = host
            self.held += host.nbytes
        else:
            write_arrays(self._file(key), {"array": host})

    def get(self, key: Key) -> np.ndarray:
        """The array of a key that `has` knows."""
        found = self._arrays.get(key)
        return ArraysFile(self._file(key)).read("array") if found is None else found

    def has(self, key: Key) -> bool:
        """Whether there is such an array, of this process or of one before it."""
        return key in self._arrays or self._file(key).is_file()

    def drop(self, key: Key) -> None:
        """Forgets an array, if it is there."""
        array = self._arrays.pop(key, None)
        self.held -= 0 if array is None else array.nbytes
        with contextlib.suppress(FileNotFoundError):
            self._file(key).unlink()

    def _file(self, key: Key) -> Path:
        what, block, batch = key
        return self._folder / f"{what}-{block:05d}-{batch:05d}.safetensors"
