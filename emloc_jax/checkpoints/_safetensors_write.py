"""Safetensors files written one tensor at a time, so a merge never holds two models.

The `safetensors` library writes only what is in memory all at once, so the header (eight bytes of
length, then JSON) is written here; the tests read the files back with the library.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emloc_jax.checkpoints._dtypes import NUMPY_DTYPES, all_finite
from emloc_jax.checkpoints._safetensors_read import STEMS
from emloc_jax.errors import CheckpointError, NonFiniteError

__all__ = [
    "Pieces",
    "TensorPlan",
    "plan_shards",
    "planned_bytes",
    "write_safetensors",
    "write_index",
]

#: An array, or its slices along the first axis in order.
Pieces = np.ndarray | Iterable[np.ndarray]


class TensorPlan(NamedTuple):
    """A tensor that will be written: its name, safetensors type word and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it will take in the file."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def planned_bytes(plans: Iterable[TensorPlan]) -> int:
    """Bytes that all the tensors will take, with a generous guess for the headers.

    >>> planned_bytes([TensorPlan("w", "BF16", (10, 10))])
    712
    """
    return sum(plan.nbytes + 512 for plan in plans)


def write_safetensors(
    path: Path,
    plans: Iterable[TensorPlan],
    read: Callable[[str], Pieces],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, calling `read(name)` once per tensor, in order.

    Args:
      path: a file inside a folder of `new_directory`, or a path of `new_file`.
      plans: the tensors; wider types are written first, so that all stay aligned.
      read: gives the array of a name, of the planned shape, or its slices along the first axis
        one by one, so that it is never whole in memory; they are cast to the planned type.
      metadata: strings for the header. `{"format": "pt"}` is what torch readers ask for.

    Raises:
      CheckpointError: an array has another shape than planned.
      NonFiniteError: an array has an infinity or a NaN, or gets one by the cast.
    """
    plans = sorted(plans, key=lambda plan: -NUMPY_DTYPES[plan.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, dtype, shape in plans:
        start, end = end, end + TensorPlan(name, dtype, shape).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in plans:
            for array in _pieces(read(name), name, dtype, shape):
                file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _pieces(found: Pieces, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    if isinstance(found, np.ndarray):
        yield _cast(found, name, dtype, shape)
        return
    count = 0
    for array in found:
        yield _cast(array, name, dtype, shape[1:])
        count += 1
    if count != shape[0]:
        raise CheckpointError(
            f"Tensor {name!r} should have shape {shape}, but {count} slices of it were given."
        )


def _cast(array: np.ndarray, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise CheckpointError(f"Tensor {name!r} should have shape {shape}, but has {array.shape}.")
    with np.errstate(over="ignore", invalid="ignore"):  # reported just below, by name
        cast = np.ascontiguousarray(array.astype(NUMPY_DTYPES[dtype], copy=False))
    if not all_finite(cast):
        raise NonFiniteError(
            f"Tensor {name!r} has infinite or NaN entries once stored as {dtype}; nothing was "
            "written. Check the training run that made it, or choose a wider type."
        )
    return cast


def plan_shards(plans: list[TensorPlan], largest: int) -> dict[str, list[TensorPlan]]:
    """Split the tensors, in order, over files of at most `largest` bytes, named as HF names them.

    >>> two = [TensorPlan("a", "F32", (4,)), TensorPlan("b", "F32", (4,))]
    >>> list(plan_shards(two, 100))
    ['model.safetensors']
    >>> list(plan_shards(two, 16))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    shards: list[list[TensorPlan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + plan.nbytes > largest:
            shards.append([])
        shards[-1].append(plan)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": shards[i] for i in range(count)}


def write_index(folder: Path, shards: Mapping[str, list[TensorPlan]]) -> None:
    """Writes the index of several shards into `folder`; a single file has none."""
    stem = next((stem for stem in reversed(STEMS) if next(iter(shards)).startswith(stem)), STEMS[0])
    if list(shards) == [f"{stem}.safetensors"]:
        return
    every = [plan for plans in shards.values() for plan in plans]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(plan.shape) for plan in every),
            "total_size": sum(plan.nbytes for plan in every),
        },
        "weight_map": {plan.name: shard for shard, plans in shards.items() for plan in plans},
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
