"""First-fit packing: several rows share one sequence, told apart by segments."""

from __future__ import annotations

from collections.abc import Sequence

import grain
import grain.experimental
import numpy as np

from emloc_jax.training._encode import Example

__all__ = ["pack"]

_FEATURES = ("tokens", "targets", "weights")


def pack(
    indices: grain.IterDataset,
    *,
    examples: Sequence[Example],
    batch_size: int,
    length: int,
    bins: int,
) -> grain.IterDataset:
    """Batches of `(batch_size, length)` arrays out of a stream of example indices.

    `bins` sequences are open at a time: each row goes into the first that has room, and all of
    them leave once a row fits nowhere. Segments count from 1 in each sequence (0 is padding) and
    positions restart with every segment.
    """

    def features(index: int) -> dict[str, np.ndarray]:
        example = examples[index]
        return {name: getattr(example, name) for name in _FEATURES}

    def conventional(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        kept = {name: packed[name] for name in _FEATURES}
        return kept | {
            "positions": packed["tokens_positions"],
            "segments": packed["tokens_segment_ids"],
        }

    def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        missing = ((0, batch_size - len(rows)), (0, 0))  # the last batch gets padding rows
        return {key: np.pad(np.stack([row[key] for row in rows]), missing) for key in rows[0]}

    packed = grain.experimental.FirstFitPackIterDataset(
        indices.map(features),
        length_struct=dict.fromkeys(_FEATURES, length),
        num_packing_bins=bins,
        shuffle_bins=False,  # the rows were shuffled already
    )
    return packed.map(conventional).batch(batch_size, batch_fn=collate)
