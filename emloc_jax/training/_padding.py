"""Batches of equal-length rows: collation, and a Grain dataset that groups rows by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from emloc_jax.training._encode import Example

__all__ = ["BucketBatchIterDataset", "Pad", "Tokenised", "pad_examples"]


class Tokenised(Protocol):
    """What can be batched: tokens, and where they come from."""

    @property
    def tokens(self) -> np.ndarray:
        """(n,) int32."""
        ...

    @property
    def origin(self) -> str:
        """Where the row stands."""
        ...


Pad = Callable[..., dict[str, np.ndarray]]


def pad_examples(
    examples: Sequence[Example], *, batch_size: int, length: int
) -> dict[str, np.ndarray]:
    """One batch of `(batch_size, length)` arrays; missing rows and tails are padding.

    Returns:
        `tokens`, `targets`, `positions`, `segments` int32 and `weights` float32. Segments are 1 on
        tokens and 0 on padding.

    Example:
        >>> one = np.ones(2, np.int32)
        >>> batch = pad_examples([Example(one, one, one, "row 1")], batch_size=1, length=4)
        >>> batch["segments"].tolist()
        [[1, 1, 0, 0]]
    """
    shape = (batch_size, length)
    names = ("tokens", "targets", "positions", "segments")
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in names}
    batch["weights"] = np.zeros(shape, np.float32)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        batch["tokens"][row, :size] = example.tokens
        batch["targets"][row, :size] = example.targets
        batch["weights"][row, :size] = example.weights
        batch["positions"][row, :size] = np.arange(size)
        batch["segments"][row, :size] = 1
    return batch


class BucketBatchIterDataset(grain.IterDataset):
    """Groups a stream of example indices into batches, one bucket of lengths per batch.

    A bucket's batch leaves as soon as it is full; at the end of the stream the unfinished ones
    leave too, shortest first, filled up with padding rows. The state is the stream's own plus the
    indices that wait, so it is exact and small.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        *,
        examples: Sequence[Tokenised],
        batch_size: int,
        buckets: Sequence[int],
        pad: Pad = pad_examples,
    ):
        super().__init__(parent)
        self._options = examples, batch_size, sorted(buckets), pad

    def __iter__(self) -> grain.DatasetIterator:
        return _BucketIterator(iter(self._parent), *self._options)


class _BucketIterator(grain.DatasetIterator):
    def __init__(
        self,
        parent: grain.DatasetIterator,
        examples: Sequence[Tokenised],
        batch_size: int,
        buckets: Sequence[int],
        pad: Pad,
    ):
        super().__init__(parent)
        self._examples = examples
        self._batch_size = batch_size
        self._buckets = buckets
        self._pad = pad
        self._waiting: list[list[int]] = [[] for _ in buckets]

    def __next__(self) -> dict[str, np.ndarray]:
        for index in self._parent:
            size = len(self._examples[index].tokens)
            bucket = next(b for b, length in enumerate(self._buckets) if size <= length)
            self._waiting[bucket].append(int(index))
            if len(self._waiting[bucket]) == self._batch_size:
                return self._emit(bucket)
        for bucket, waiting in enumerate(self._waiting):
            if waiting:
                return self._emit(bucket)
        raise StopIteration

    def _emit(self, bucket: int) -> dict[str, np.ndarray]:
        indices, self._waiting[bucket] = self._waiting[bucket], []
        rows = [self._examples[i] for i in indices]
        return self._pad(rows, batch_size=self._batch_size, length=self._buckets[bucket])

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "waiting": [list(w) for w in self._waiting]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._waiting = [list(w) for w in state["waiting"]]
