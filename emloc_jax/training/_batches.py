"""Deterministic, resumable batches of tokenised rows, on Grain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from emloc_jax.errors import ConfigError, DataError, ResumeError
from emloc_jax.training._encode import Example
from emloc_jax.training._packing import pack
from emloc_jax.training._padding import BucketBatchIterDataset, Pad, Tokenised, pad_examples

__all__ = ["BatchIterator", "Batches", "packed_batches", "padded_batches"]

_ALIGNMENT = 32  # default lengths are rounded up to this, as matrix units like


class Batches:
    """A stream of batches that can be walked again and again; see `padded_batches`.

    Each batch is a dict of numpy arrays: by default `(batch_size, length)` `tokens`, `targets`,
    `positions` and `segments` (int32), `weights` (float32). Batches come in the order that the
    seed gives.
    """

    def __init__(self, dataset: grain.IterDataset, fingerprint: str):
        self._dataset = dataset
        self.fingerprint = fingerprint

    def __iter__(self) -> BatchIterator:
        return BatchIterator(iter(self._dataset), self.fingerprint)


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """An iterator whose position can be saved; an equal stream continues from it bit for bit."""

    def __init__(self, iterator: grain.DatasetIterator, fingerprint: str):
        self._iterator = iterator
        self._fingerprint = fingerprint

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as a dict that JSON can hold."""
        return {"stream": self._iterator.get_state(), "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position of an equal stream.

        Raises:
            ResumeError: the state was taken from other rows or other batch settings.
        """
        if state.get("fingerprint") != self._fingerprint:
            raise ResumeError(
                "the data position was saved on other rows or other batch settings "
                f"(fingerprint {state.get('fingerprint')}, here {self._fingerprint}); "
                "resume with the data of the first run, or start a new run."
            )
        self._iterator.set_state(state["stream"])


def padded_batches(
    examples: Sequence[Tokenised],
    *,
    batch_size: int,
    buckets: Sequence[int] | None = None,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    pad: Pad = pad_examples,
) -> Batches:
    """Batches with one row per sequence, padded to the smallest bucket that holds it.

    A training step is compiled once per bucket that occurs.

    Args:
        examples: tokenised rows.
        batch_size: sequences per batch.
        buckets: allowed lengths; by default one, the longest row rounded up to 32.
        seed: of the order of the rows, another one in each epoch.
        shuffle: whether the rows are shuffled.
        epochs: passes over the rows; `None` repeats for ever. The last batches of a finite stream
            are filled up with padding rows, so that every row comes and shapes stay.
        pad: makes a batch of rows: `pad_examples`, or `pad_labelled_examples` for labelled ones.

    Raises:
        DataError: no rows, or one that is longer than the largest bucket.
        ConfigError: an impossible size.

    Example:
        >>> row = np.arange(3, dtype=np.int32)
        >>> example = Example(row, row + 1, np.ones(3, np.float32), "row 1")
        >>> stream = iter(padded_batches([example] * 5, batch_size=2, buckets=[4]))
        >>> first, position, second = next(stream), stream.get_state(), next(stream)
        >>> stream.set_state(position)
        >>> bool((next(stream)["tokens"] == second["tokens"]).all())
        True
    """
    longest = _longest(examples)
    if buckets is None:
        buckets = [-(-longest // _ALIGNMENT) * _ALIGNMENT]
    _require_positive(batch_size=batch_size, buckets=min(buckets, default=0), epochs=epochs)
    _refuse_longer(examples, max(buckets), "the largest bucket")
    dataset = BucketBatchIterDataset(
        _indices(len(examples), seed=seed, shuffle=shuffle, epochs=epochs),
        examples=examples,
        batch_size=batch_size,
        buckets=buckets,
        pad=pad,
    )
    settings = ("padded", batch_size, sorted(buckets), seed, shuffle, epochs)
    return Batches(dataset, _fingerprint(examples, settings))


def packed_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    bins: int | None = None,
) -> Batches:
    """Batches of sequences of `length` tokens, each filled first-fit with several rows.

    Rows of one sequence have segments 1, 2, … and positions that restart, so a model that attends
    within segments sees each row as if alone. Nothing is split.

    Args:
        examples: tokenised rows.
        batch_size: sequences per batch.
        length: tokens per sequence.
        seed: as for `padded_batches`.
        shuffle: as for `padded_batches`.
        epochs: as for `padded_batches`.
        bins: sequences that are open at a time; more pack tighter. By default `batch_size`, and at
            least 16.

    Raises:
        DataError: no rows, or one that is longer than `length`.
        ConfigError: an impossible size.

    Example:
        >>> row = np.arange(3, dtype=np.int32)
        >>> example = Example(row, row + 1, np.ones(3, np.float32), "row 1")
        >>> (batch,) = packed_batches([example] * 3, batch_size=2, length=8, epochs=1)
        >>> batch["segments"].tolist()
        [[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    """
    bins = max(batch_size, 16) if bins is None else bins
    _longest(examples)
    _require_positive(batch_size=batch_size, length=length, bins=bins, epochs=epochs)
    _refuse_longer(examples, length, "a sequence")
    dataset = pack(
        _indices(len(examples), seed=seed, shuffle=shuffle, epochs=epochs),
        examples=examples,
        batch_size=batch_size,
        length=length,
        bins=bins,
    )
    settings = ("packed", batch_size, length, bins, seed, shuffle, epochs)
    return Batches(dataset, _fingerprint(examples, settings))


def _indices(count: int, *, seed: int, shuffle: bool, epochs: int | None) -> grain.IterDataset:
    indices = grain.MapDataset.range(count).seed(seed)
    if shuffle:
        indices = indices.shuffle()
    # The rows lie in memory: reading them in threads would only cost order and time.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return indices.repeat(epochs).to_iter_dataset(options)


def _longest(examples: Sequence[Tokenised]) -> int:
    if not len(examples):
        raise DataError("no rows were given; batches need at least one.")
    return max(len(example.tokens) for example in examples)


def _refuse_longer(examples: Sequence[Tokenised], limit: int, what: str) -> None:
    for example in examples:
        if len(example.tokens) > limit:
            raise DataError(
                f"{example.origin}: the row has {len(example.tokens)} tokens, {what} holds "
                f"{limit}; allow longer ones, or tokenise with a smaller max_length."
            )


def _require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")


def _fingerprint(examples: Sequence[Tokenised], settings: tuple) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for example in examples:
        for array in vars(example).values():
            if isinstance(array, np.ndarray):
                digest.update(np.int64(array.size).tobytes() + array.tobytes())
            elif isinstance(array, tuple):  # files of images
                digest.update(json.dumps(array).encode())
    return digest.hexdigest()[:16]
