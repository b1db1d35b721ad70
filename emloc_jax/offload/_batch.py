"""What a trainer asks of a batch: the stack's inputs, its weight, and its parts."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from emloc_jax.errors import ConfigError

__all__ = ["Batch", "cut", "token_inputs", "total_weight"]

Batch = Mapping[str, Any]


def token_inputs(batch: Batch) -> tuple[Any, ...]:
    """Tokens, positions and segments of a batch of the language models here."""
    return batch["tokens"], batch.get("positions"), batch.get("segments")


def total_weight(batch: Batch) -> float:
    """Sum of the batch's `weights`."""
    return float(np.sum(batch["weights"]))


def cut(batch: Batch, parts: int) -> list[Batch]:
    """The batch in equal parts along its rows.

    Raises:
      ConfigError: the rows cannot be shared out evenly.
    """
    rows = {len(array) for array in jax.tree.leaves(dict(batch))}
    if len(rows) != 1 or min(rows) % parts:
        raise ConfigError(
            f"A batch with {sorted(rows)} rows cannot be cut into {parts} equal micro-batches."
        )
    size = min(rows) // parts
    return [
        jax.tree.map(lambda array, i=i: array[i * size : (i + 1) * size], dict(batch))
        for i in range(parts)
    ]
