"""Safetensors files read one tensor at a time, and checked before that."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from emloc_jax.checkpoints._dtypes import NUMPY_DTYPES
from emloc_jax.checkpoints._source import TensorInfo
from emloc_jax.errors import CheckpointError
from emloc_jax.models import is_buffer

__all__ = ["STEMS", "SafetensorsSource", "read_index"]

_AGAIN = "Get the file again from where it came from."
# transformers calls a weights file so, and diffusers calls it so.
STEMS = ("model", "diffusion_pytorch_model")


class SafetensorsSource:
    """The tensors of one or more safetensors files as one checkpoint.

    Opening reads only the headers: that every header is whole, that the file is as long as its
    header says, that no tensor occurs twice, and that every type is fp32, fp16 or bf16. Buffers of
    another type (BERT's position numbers) are passed over: no parameter stands for them.

    Raises:
      CheckpointError: a file is missing, truncated or corrupt, or holds another type.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}
        self._passed: set[str] = set()
        for file in files:
            self._open(file)

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"There is no file {file}. {_AGAIN}")
        try:
            handle = safe_open(file, framework="np").__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            size = file.stat().st_size
            raise CheckpointError(
                f"{file} ({size:,} bytes) is no whole safetensors file: {error}. {_AGAIN}"
            ) from error
        self.metadata[file] = handle.metadata() or {}
        for name in handle.keys():
            entry = handle.get_slice(name)
            dtype = entry.get_dtype()
            if dtype not in NUMPY_DTYPES and is_buffer(name):
                self._passed.add(name)
                continue
            if dtype not in NUMPY_DTYPES:
                raise CheckpointError(
                    f"Tensor {name!r} of {file} has type {dtype}; only fp32, fp16 and bf16 "
                    "are read. Take an unquantised checkpoint of this model."
                )
            if name in self.tensors:
                raise CheckpointError(
                    f"Tensor {name!r} is in both {self.tensors[name].file} and {file}. {_AGAIN}"
                )
            self.tensors[name] = TensorInfo(tuple(entry.get_shape()), dtype, file)

    @classmethod
    def of_folder(cls, folder: Path, stem: str = STEMS[0]) -> "SafetensorsSource":
        """The checkpoint of a Hugging Face folder, in one file or in shards with an index.

        Args:
          folder: the folder.
          stem: what its weights files are called, one of `STEMS`.

        Raises:
          CheckpointError: there are no safetensors, a shard is missing, or index and shards
            disagree about which tensors there are and where.
        """
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return cls([single])
        index_file = folder / f"{single.name}.index.json"
        if not index_file.is_file():
            raise CheckpointError(_no_weights(folder, single.name, index_file.name))
        index = read_index(index_file)
        files = sorted({folder / shard for shard in index.values()})
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise CheckpointError(
                f"{index_file} names {len(lost)} missing shard(s): {', '.join(lost)}. "
                "Put them into the same folder, or download the checkpoint again."
            )
        source = cls(files)
        stored = {name: info.file.name for name, info in source.tensors.items()}
        wrong = [
            name
            for name in index | stored
            if index.get(name) != stored.get(name) and name not in source._passed
        ]
        if wrong:
            listed = "; ".join(
                f"{name}: index says {index.get(name, 'nothing')}, found in "
                f"{stored.get(name, 'no shard')}"
                for name in wrong[:8]
            )
            raise CheckpointError(
                f"{index_file} and its shards disagree about {len(wrong)} tensor(s): "
                f"{listed}. {_AGAIN}"
            )
        return source

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The tensor, or one slice of it along the first axis, in its stored type.

        It is read, not mapped, so that nothing of the file stays in the process's memory.
        """
        info = self.tensors[name]
        header, start = self._header(info.file)
        low, high = header[name]["data_offsets"]
        shape = info.shape
        if index is not None:
            size, shape = (high - low) // shape[0], shape[1:]
            low, high = low + index * size, low + (index + 1) * size
        data = np.fromfile(info.file, np.uint8, count=high - low, offset=start + low)
        return data.view(NUMPY_DTYPES[info.dtype]).reshape(shape)

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of the tensor as a view of the file: (n,) uint8.

        A map of its own, so that what was looked at leaves the memory with the view.
        """
        file = self.tensors[name].file
        header, start = self._header(file)
        low, high = header[name]["data_offsets"]
        if low == high:
            return np.empty(0, np.uint8)
        return np.memmap(file, np.uint8, mode="r", offset=start + low, shape=(high - low,))

    def _header(self, file: Path) -> tuple[dict[str, Any], int]:
        """What the file says of its tensors, and where their bytes start."""
        if file not in self._headers:
            with open(file, "rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                self._headers[file] = json.loads(opened.read(size)), 8 + size
        return self._headers[file]


def read_index(path: Path) -> dict[str, str]:
    """The map from tensor name to shard file of a `model.safetensors.index.json`.

    Raises:
      CheckpointError: the file is no JSON with a `weight_map` of plain file names.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(shard).name == shard for shard in weight_map.values())
        if not (plain and weight_map):
            raise ValueError("its weight_map is empty, or names files outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors index: {error!r}. {_AGAIN}") from error
    return weight_map


def _no_weights(folder: Path, single: str, index: str) -> str:
    others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pth", ".msgpack"})
    found = f" It holds {', '.join(others[:4])}: save those as safetensors first." if others else ""
    return f"{folder} has neither {single} nor {index}.{found}"
