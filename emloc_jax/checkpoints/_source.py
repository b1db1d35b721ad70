"""Where weights come from: named tensors that are listed first and read one at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["TensorInfo", "WeightSource"]


class TensorInfo(NamedTuple):
    """What a file says of a tensor before its numbers are read."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' word (F32, F16, BF16), or the name of a GGUF quantisation
    file: Path


class WeightSource(Protocol):
    """A checkpoint on disk, under Hugging Face names and in Hugging Face's orientation."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What there is, by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor of that name, alone, in fp32, fp16 or bf16."""
        ...

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of the tensor of that name, without copying them all: (n,) uint8."""
        ...
