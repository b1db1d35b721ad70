"""Which base something was made for: a short identity of a model's weights.

An adapter or an emulator fits only the base it was made from, and another base of the same
architecture has the same names and shapes, so the numbers must be looked at. The fingerprint is
the SHA-256 over, for every tensor in order of names: its name, its type, its shape, and its bytes:
all of them up to 64 KiB, and beyond that 16 stretches of 4 KiB spread evenly from the first byte to
the last. So it reads a few megabytes of a model of any size. Training changes nearly every number
of a tensor it touches, which the sample shows; a change of single numbers made by hand may escape
it. It is an identity, not a seal against forgery.

Of a checkpoint it is taken over the file's own tensors, so it does not depend on the dtype or the
form (scanned or not) that the checkpoint is loaded in. A bare parameter tree has a fingerprint of
its own kind, over its unrolled paths.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from emloc_jax.checkpoints._layers import layer_leaves
from emloc_jax.checkpoints._locate import locate
from emloc_jax.checkpoints._pretrained import Pretrained, open_source
from emloc_jax.models import is_buffer

__all__ = [
    "StackedSample",
    "base_fingerprint",
    "calibration_fingerprint",
    "stacked_fingerprint",
    "stacked_sample",
]

_WHOLE, _STRETCH, _COUNT = 1 << 16, 1 << 12, 16

_Entry = tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]


def base_fingerprint(base: Pretrained | str | os.PathLike | Mapping[str, Any]) -> str:
    """The identity of a base model: `weights:` or `params:` and 64 hexadecimal digits.

    Args:
      base: a loaded model, or the folder, GGUF file or hub id of one (`weights:`), or a parameter
        tree without boxes (`params:`).

    Raises:
      CheckpointError: the checkpoint cannot be opened.

    >>> import numpy as np
    >>> base_fingerprint({"norm": {"scale": np.ones(4, np.float32)}})[:12]
    'params:aa36f'
    """
    if isinstance(base, Mapping):
        return "params:" + _digest(_tree_entries(base))
    path = base.source if isinstance(base, Pretrained) else locate(base)
    return "weights:" + _digest(_file_entries(Path(path)))


def calibration_fingerprint(moments: Mapping[str, Any]) -> str:
    """The identity of second moments: `moments:` and 64 hexadecimal digits.

    Args:
      moments: {path: SecondMoment}, or any other tree of arrays.

    >>> import numpy as np
    >>> calibration_fingerprint({"head/kernel": np.eye(3)})[:12]
    'moments:a612'
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(moments)
    entries = (_array_entry(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves)
    return "moments:" + _digest(entries)


class StackedSample(NamedTuple):
    """An array that is never whole in memory, as the fingerprint of second moments sees it.

    Attributes:
      name: of the array in its tree, as `jax.tree_util.keystr` gives it.
      dtype: name of its type.
      shape: of the whole.
      sample: `stacked_sample` of all its pieces, joined in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sample: bytes


def stacked_sample(piece: np.ndarray, index: int, count: int) -> bytes:
    """The bytes of one piece that count, of an array that is `count` such pieces in a row.

    >>> import numpy as np
    >>> whole = np.arange(60_000, dtype=np.float32).reshape(2, -1)
    >>> parts = [stacked_sample(whole[i], i, 2) for i in range(2)]
    >>> stacked_sample(whole, 0, 1) == b"".join(parts), len(parts[0])
    (True, 32768)
    """
    data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    return _sample(data, index * data.size, count * data.size)


def stacked_fingerprint(samples: Iterable[StackedSample]) -> str:
    """`calibration_fingerprint` of moments that were seen piece by piece."""
    digest = hashlib.sha256()
    for name, dtype, shape, sample in sorted(samples):
        _update(digest, name, dtype, shape, sample)
    return "moments:" + digest.hexdigest()


def _digest(entries: Iterable[_Entry]) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, read in sorted(entries, key=lambda entry: entry[0]):
        data = read()
        _update(digest, name, dtype, shape, _sample(data, 0, data.size))
    return digest.hexdigest()


def _update(digest: Any, name: str, dtype: str, shape: tuple[int, ...], sample: bytes) -> None:
    digest.update(f"{name}|{dtype}|{shape}|".encode())
    digest.update(sample)


def _sample(data: np.ndarray, offset: int, size: int) -> bytes:
    """What is looked at of the bytes `offset : offset + data.size` of `size` in all."""
    if size <= _WHOLE:
        return data.tobytes()
    starts = np.linspace(0, size - _STRETCH, _COUNT).astype(np.int64) - offset
    return b"".join(data[max(start, 0) : max(start + _STRETCH, 0)].tobytes() for start in starts)


def _file_entries(path: Path) -> Iterable[_Entry]:
    source, _ = open_source(path)
    for name, info in source.tensors.items():
        if not is_buffer(name):
            yield name, info.dtype, info.shape, lambda name=name: source.raw(name)


def _tree_entries(params: Mapping[str, Any]) -> Iterable[_Entry]:
    for path, leaf in layer_leaves(params).items():
        yield _array_entry(path, leaf.array())


def _array_entry(name: str, array: np.ndarray) -> _Entry:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return name, str(array.dtype), array.shape, lambda: data
