"""Rows from files, and batches for each stage."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from emloc_jax.cli._options import DataOptions
from emloc_jax.cli._session import Session
from emloc_jax.training import (
    Batches,
    Example,
    Row,
    encode_rows,
    packed_batches,
    padded_batches,
    prompt_tokens,
    read_hub_rows,
    read_rows,
)

__all__ = ["Dataset", "calibration_batches", "evaluation_batches", "load_rows", "token_mask"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of one split, as text and as tokens."""

    rows: list[Row]
    examples: list[Example]


def load_rows(
    session: Session,
    source: str | Iterable[Mapping[str, Any]],
    options: DataOptions,
    *,
    first: int | None = None,
) -> Dataset:
    """Reads and tokenizes rows.

    Args:
      session: gives the tokenizer and the context length.
      source: a path, `hub:NAME` or `hub:NAME:SPLIT`, or rows.
      options: columns, chat, lengths.
      first: use only so many rows.
    """
    if isinstance(source, str) and source.startswith("hub:"):
        name, _, split = source.removeprefix("hub:").partition(":")
        rows = read_hub_rows(name, split=split or "train", columns=options.columns)
    else:
        rows = read_rows(source, columns=options.columns)
    rows = rows[:first]
    limit = min(options.max_length, session.base.config.max_position_embeddings)
    examples = encode_rows(
        rows,
        session.tokenizer,
        max_length=limit,
        chat=options.chat,
        system=options.system,
        truncate=options.truncate,
    )
    return Dataset(rows, examples)


def training_batches(data: Dataset, options: DataOptions, *, batch_size: int, seed: int) -> Batches:
    """An endless, resumable stream."""
    if options.packing:
        length = options.max_length
        return packed_batches(data.examples, batch_size=batch_size, length=length, seed=seed)
    return padded_batches(data.examples, batch_size=batch_size, buckets=options.buckets, seed=seed)


def calibration_batches(
    data: Dataset, options: DataOptions, *, rows: int, batch_size: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Batches of `rows` training rows, drawn without replacement."""
    count = min(rows, len(data.examples))
    chosen = np.random.default_rng(seed).permutation(len(data.examples))[:count]
    examples = [data.examples[i] for i in np.sort(chosen)]
    return evaluation_batches(examples, options, batch_size=batch_size)


def evaluation_batches(
    examples: Sequence[Example], options: DataOptions, *, batch_size: int
) -> list[dict[str, np.ndarray]]:
    """One pass in order; rows of like length share a batch."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    batches = padded_batches(
        ordered, batch_size=batch_size, buckets=options.buckets, shuffle=False, epochs=1
    )
    return list(batches)


def token_mask(batch: Mapping[str, Any]) -> Any:
    """Which positions hold real tokens (B, T); padding must not count in second moments."""
    return batch["segments"] > 0


def prompt_reader(session: Session, options: DataOptions, new_tokens: int) -> Any:
    """From a row to the token ids of its prompt, which must leave room for `new_tokens`."""
    return functools.partial(
        prompt_tokens,
        tokenizer=session.tokenizer,
        max_length=session.base.config.max_position_embeddings - new_tokens,
        chat=options.chat,
        system=options.system,
    )
