"""Tokenized rows, and batches for each stage."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emloc_jax.cli._image_data import (
    encode_image_texts,
    encode_images,
    image_prompt,
    image_tokens,
)
from emloc_jax.cli._options import DataOptions
from emloc_jax.cli._rows import Rows
from emloc_jax.cli._session import Session
from emloc_jax.errors import ConfigError
from emloc_jax.models import InternVLConfig, image_token_masks
from emloc_jax.training import (
    Batches,
    Example,
    LabelledExample,
    LabelledImage,
    LabelledRow,
    Row,
    encode_labelled_rows,
    encode_rows,
    packed_batches,
    pad_examples,
    pad_labelled_examples,
    padded_batches,
    prompt_tokens,
)

__all__ = [
    "Dataset",
    "calibration_batches",
    "encode",
    "evaluation_batches",
    "prompt_reader",
    "token_mask",
    "training_batches",
]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of one split, as text and as tokens.

    Attributes:
      rows: as read.
      examples: tokenized.
      pad: makes a batch of examples.
    """

    rows: Rows
    examples: Sequence[Example] | Sequence[LabelledExample] | Sequence[LabelledImage]
    pad: Callable[..., dict[str, np.ndarray]]


def encode(session: Session, rows: Rows, options: DataOptions) -> Dataset:
    """Tokenizes rows.

    Args:
      session: gives the tokenizer and the context length.
      rows: as read.
      options: chat, lengths.

    Raises:
      ConfigError: rows to classify, for a language model, or the other way round.
      DataError: a row that does not fit.
    """
    if session.task is not None and session.task.images:
        return Dataset(rows, *encode_images(session, rows, options))
    limit = min(options.max_length, session.base.config.max_position_embeddings)
    if session.task is not None:
        examples = encode_labelled_rows(
            [row for row in rows if isinstance(row, LabelledRow)],
            session.tokenizer,
            names=session.task.names,
            max_length=limit,
            token_types=session.base.config.model_type == "bert",
            truncate=options.truncate,
        )
        return Dataset(rows, examples, pad_labelled_examples)
    texts = [row for row in rows if isinstance(row, Row)]
    if len(texts) < len(rows):
        raise ConfigError(
            f"The rows have labels; {session.base.source} is run as a language model here. Give "
            "rows with prompt and completion."
        )
    if isinstance(session.base.config, InternVLConfig):
        return Dataset(*encode_image_texts(session, texts, options, limit))
    for row in texts:
        if row.images:
            raise ConfigError(
                f"{row.origin}: the row has images, but {session.base.source} is a "
                f"{session.base.config.model_type}, which reads text alone. Give an InternVL."
            )
    examples = encode_rows(
        texts,
        session.tokenizer,
        max_length=limit,
        chat=options.chat,
        system=options.system,
        truncate=options.truncate,
    )
    return Dataset(texts, examples, pad_examples)


def training_batches(data: Dataset, options: DataOptions, *, batch_size: int, seed: int) -> Batches:
    """An endless, resumable stream."""
    if options.packing:  # refused for labelled rows before
        examples: Any = data.examples
        return packed_batches(examples, batch_size=batch_size, length=options.max_length, seed=seed)
    return padded_batches(
        data.examples, batch_size=batch_size, buckets=options.buckets, seed=seed, pad=data.pad
    )


def calibration_batches(
    data: Dataset, options: DataOptions, *, rows: int, batch_size: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Batches of `rows` training rows, drawn without replacement."""
    count = min(rows, len(data.examples))
    chosen = np.random.default_rng(seed).permutation(len(data.examples))[:count]
    examples: Any = [data.examples[i] for i in np.sort(chosen)]
    data = dataclasses.replace(data, examples=examples)
    return evaluation_batches(data, options, batch_size=batch_size)


def evaluation_batches(
    data: Dataset, options: DataOptions, *, batch_size: int
) -> list[dict[str, np.ndarray]]:
    """One pass in order; rows of like length share a batch."""
    batches = padded_batches(
        sorted(data.examples, key=lambda example: len(example.tokens)),
        batch_size=batch_size,
        buckets=options.buckets,
        shuffle=False,
        epochs=1,
        pad=data.pad,
    )
    return list(batches)


def token_mask(batch: Mapping[str, Any]) -> Any:
    """Which positions hold real tokens; padding must not count in second moments.

    (B, T), or (B,) of images to classify, or by part of a model of text and images.
    """
    if "tiles" in batch:
        return image_token_masks(batch)
    if "segments" not in batch:
        return batch["weights"] > 0
    return batch["segments"] > 0


def prompt_reader(session: Session, options: DataOptions, new_tokens: int) -> Any:
    """From a row to the token ids of its prompt, which must leave room for `new_tokens`."""
    read: Any = prompt_tokens
    if isinstance(session.base.config, InternVLConfig):
        read = functools.partial(image_prompt, words=image_tokens(session, options.max_tiles))
    return functools.partial(
        read,
        tokenizer=session.tokenizer,
        max_length=session.base.config.max_position_embeddings - new_tokens,
        chat=options.chat,
        system=options.system,
    )
