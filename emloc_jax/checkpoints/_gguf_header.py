"""The header of a GGUF file: metadata and where each tensor lies.

Parsed here and not by `gguf.GGUFReader`, for two reasons: every length is checked against the file
before it is used (the reader can loop for ever on a corrupt count), and it takes a twentieth of
the time. The layout is that of GGUF versions 2 and 3, little endian:
magic, version, counts, key-value pairs, tensor infos, padding, tensor data.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from emloc_jax.errors import CheckpointError

__all__ = ["GgufHeader", "GgufTensor", "read_header"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """Where a tensor lies: shape in row-major order (GGUF writes it reversed), type, byte range."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int


class GgufHeader(NamedTuple):
    """Metadata and tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file and check that all tensors lie inside the file.

    Raises:
      CheckpointError: the file is missing, not GGUF, of another version, corrupt or truncated.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    size = path.stat().st_size
    try:
        if size < 24:
            raise ValueError("it is shorter than a GGUF header")
        with open(path, "rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, size).header()
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) is no whole GGUF file: {error}. "
            "Get the file again from where it came from."
        ) from error


class _Cursor:
    """A position in the file that refuses to leave it."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data, self.size, self.at = data, size, 0

    def header(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; versions 2 and 3 (little endian) are read")
        num_tensors, num_pairs = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.string()
            metadata[key] = self.value(self.number("I"))
        tensors, end = {}, 0
        for _ in range(num_tensors):
            name, tensor = self.tensor()
            if name in tensors:
                raise ValueError(f"tensor {name!r} is listed twice")
            tensors[name], end = tensor, max(end, tensor.start + tensor.nbytes)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        begin = math.ceil(self.at / alignment) * alignment
        if begin + end > self.size:
            raise ValueError(
                f"it is truncated: {begin + end:,} bytes are needed for its {num_tensors} tensors"
            )
        moved = {name: t._replace(start=begin + t.start) for name, t in tensors.items()}
        return GgufHeader(metadata, moved)

    def tensor(self) -> tuple[str, GgufTensor]:
        name, axes = self.string(), self.number("I")
        if not 1 <= axes <= 4:
            raise ValueError(f"tensor {name!r} has {axes} axes")
        shape = tuple(reversed(struct.unpack(f"<{axes}Q", self.take(8 * axes))))
        if 0 in shape:
            raise ValueError(f"tensor {name!r} is empty: {shape}")
        code, offset = self.number("I"), self.number("Q")
        if code not in set(GGMLQuantizationType):
            raise ValueError(f"tensor {name!r} has the unknown type {code}")
        kind = GGMLQuantizationType(code)
        block, width = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name!r} of shape {shape} does not fill blocks of {block}")
        return name, GgufTensor(shape, kind, offset, math.prod(shape) // block * width)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(self.code(kind))
        item, count = self.number("I"), self.number("Q")
        if item == _STRING:
            if 8 * count > self.size - self.at:
                raise ValueError(f"an array of {count} strings does not fit into it")
            return [self.string() for _ in range(count)]
        if item == _ARRAY:
            raise ValueError("it holds nested arrays")
        code = self.code(item)
        return np.frombuffer(self.take(struct.calcsize(code) * count), f"<{code}").tolist()

    def code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"byte {self.at} asks for the unknown value type {kind}")
        return _SCALARS[kind]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(f"it ends inside its header, at byte {self.at:,}")
        self.at += count
        return self.data[self.at - count : self.at]
