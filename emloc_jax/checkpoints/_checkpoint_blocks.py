"""A checkpoint's parameters read a block at a time, so that no model is ever whole in memory."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from emloc_jax.checkpoints._dtypes import NUMPY_DTYPES, all_finite
from emloc_jax.checkpoints._hf_check import check_tensors, listed
from emloc_jax.checkpoints._hf_read import nest, parameter_dtype
from emloc_jax.checkpoints._layers import scanned_path
from emloc_jax.checkpoints._pretrained import Pretrained, open_source
from emloc_jax.errors import CheckpointError, NonFiniteError
from emloc_jax.kernels import flatten_leaves
from emloc_jax.models import HfTensor, hf_tensor_names

__all__ = ["CheckpointBlocks"]


class CheckpointBlocks:
    """The parameters of a checkpoint on disk, a block or a tensor at a time, as NumPy arrays.

    A `BlockSource`: tensors are read from the memory map when they are asked for, transposed to
    (d_in, d_out), cast, and handed over; nothing is kept. The numbers are those that
    `load_pretrained` gives, bit for bit.

    Args:
      base: the model, from `load_pretrained(..., abstract=True)`, whose shapes and dtypes decide.

    Attributes:
      num_blocks: L.

    Raises:
      CheckpointError: the checkpoint does not fit its config, lacks a parameter that was to be
        made afresh, or carries a head that its config ties but that differs.

    Example:
      >>> from emloc_jax.checkpoints import load_pretrained, smollm2_path
      >>> base = load_pretrained(smollm2_path(), abstract=True, tokenizer=False)
      >>> blocks = CheckpointBlocks(base)
      >>> blocks.num_blocks, blocks.block(3)["mlp"]["up_proj"]["kernel"].shape
      (30, (576, 1536))
    """

    def __init__(self, base: Pretrained):
        self._source, _ = open_source(base.source)
        self._where = str(base.source)
        if base.fresh:
            raise CheckpointError(
                f"{base.source} lacks {', '.join(base.fresh)}, and only what is on disk can be "
                "read a block at a time. Load the model whole."
            )
        stored = check_tensors(self._source, base.config, self._where)
        for copy, of in stored.copies.items():
            if not np.array_equal(self._source.raw(copy), self._source.raw(of)):
                raise CheckpointError(
                    f"{copy} of {base.source} is to be a copy of {of}, to which config.json ties "
                    "it, but differs from it. Set tie_word_embeddings to false in config.json, or "
                    "get the checkpoint again."
                )
        self.num_blocks: int = base.config.num_layers
        self._names = stored.names
        self._tensors: dict[str, HfTensor] = hf_tensor_names(base.config)
        shapes = flatten_leaves(base.params)
        scanned = base.model.scan_layers
        self._dtypes = {
            path: parameter_dtype(shapes[scanned_path(path)[0] if scanned else path].dtype)
            for path in self._tensors
        }

    def outer(self) -> dict[str, Any]:
        """The parameters outside the blocks, each an array of its own.

        Raises:
          NonFiniteError: infinite or NaN weights.
        """
        return nest(self._read((p, p) for p in self._tensors if not p.startswith("layers/")))

    def block(self, index: int) -> dict[str, Any]:
        """The parameters of block `index`.

        Raises:
          IndexError: there is no such block.
          NonFiniteError: infinite or NaN weights.
        """
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"Block {index} of {self.num_blocks} was asked for.")
        prefix = f"layers/{index}/"
        own = (path for path in self._tensors if path.startswith(prefix))
        return nest(self._read((path, path.removeprefix(prefix)) for path in own))

    def parameter(self, path: str) -> np.ndarray:
        """One parameter by its unrolled path, `layers/3/mlp/up_proj/kernel` say.

        Raises:
          KeyError: the model has no such parameter.
          NonFiniteError: infinite or NaN weights.
        """
        return self._read([(path, path)])[path]

    def _read(self, paths: Iterable[tuple[str, str]]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        infinite = []
        for path, name in paths:
            tensor = self._tensors[path]
            array = tensor.to_parameter(self._source.read(self._names[tensor.name]))
            with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
                array = np.array(array, self._dtypes[path] or NUMPY_DTYPES["F32"], order="C")
            if not all_finite(array):
                infinite.append(self._names[tensor.name])
            arrays[name] = array
        if infinite:
            raise NonFiniteError(
                f"Infinite or NaN weights in {len(infinite)} tensor(s) of {self._where}:\n"
                f"{listed(infinite)}\nThe checkpoint is damaged, or its range needs a wider dtype."
            )
        return arrays
