"""An emulator's parameters read a block at a time, as those of a checkpoint are."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from emloc_jax.checkpoints._dtypes import all_finite
from emloc_jax.checkpoints._emulator_folder import open_emulator
from emloc_jax.checkpoints._hf_read import nest
from emloc_jax.checkpoints._layers import is_scanned, scanned_path
from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.errors import CheckpointError, NonFiniteError
from emloc_jax.kernels import LowRankKernel

__all__ = ["EmulatorBlocks"]


class EmulatorBlocks:
    """The parameters of an emulator on disk, a block or a leaf at a time.

    A `BlockSource`; of stacked layers, a block's slices are read and nothing else.

    Args:
      folder: of the emulator, scanned or not.
      base: the model it must have been made from.

    Attributes:
      num_blocks: L.

    Raises:
      CheckpointError: see `load_emulator`.
    """

    def __init__(self, folder: str | os.PathLike, base: Pretrained):
        self._folder = Path(folder)
        self._source, self._config = open_emulator(self._folder, base)
        self.num_blocks: int = base.config.num_layers
        self._scanned = is_scanned(self._source.tensors)
        if self._scanned != base.model.scan_layers:
            kind = "stacked" if self._scanned else "separate"
            raise CheckpointError(
                f"The emulator in {self._folder} has {kind} layers and the model "
                f"scan_layers={base.model.scan_layers}. Load the model with "
                f"scan_layers={self._scanned}."
            )
        self._leaves: dict[str, None] = {}  # in order
        for name in self._source.tensors:
            path, _, side = name.rpartition("/")
            factor = path in self._config.ranks and side in ("left", "right")
            self._leaves.setdefault(path if factor else name)

    def outer(self) -> dict[str, Any]:
        """The parameters outside the blocks."""
        return nest({p: self.leaf(p) for p in self._leaves if not p.startswith("layers/")})

    def block(self, index: int) -> dict[str, Any]:
        """The parameters of block `index`, with boxes where kernels were compressed."""
        prefix = "layers/" if self._scanned else f"layers/{index}/"
        names = [p.removeprefix(prefix) for p in self._leaves if p.startswith(prefix)]
        return nest({name: self.leaf(f"layers/{index}/{name}") for name in names})

    def leaf(self, path: str) -> Any:
        """One leaf by its unrolled path: an array, or a `LowRankKernel` of arrays.

        Raises:
          KeyError: there is no such leaf.
          NonFiniteError: it holds infinite or NaN entries.
        """
        stored, layer = scanned_path(path) if self._scanned else (path, None)
        if stored not in self._config.ranks:
            return self._array(stored, layer)
        left, right = (self._array(f"{stored}/{side}", layer) for side in ("left", "right"))
        layout = self._config.layouts[stored]
        return LowRankKernel(left, right, layout=layout)  # pyright: ignore[reportArgumentType]

    def _array(self, name: str, layer: int | None) -> np.ndarray:
        array = self._source.read(name, layer)
        if not all_finite(array):
            raise NonFiniteError(
                f"The emulator in {self._folder} has infinite or NaN entries at {name}. Make it "
                "again."
            )
        return array
