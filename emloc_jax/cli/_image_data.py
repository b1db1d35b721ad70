"""Rows with images, tokenized for the model of a session."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from emloc_jax.cli._options import DataOptions
from emloc_jax.cli._session import Session
from emloc_jax.errors import ConfigError
from emloc_jax.models import InternVLConfig, check_images
from emloc_jax.training import (
    ImageProcessor,
    ImageRow,
    ImageTokens,
    Row,
    encode_image_rows,
    encode_rows,
    image_examples,
    open_image,
    pad_image_examples,
    pad_labelled_images,
    prompt_tokens,
)

__all__ = ["ImagePrompt", "encode_image_texts", "encode_images", "image_prompt", "image_tokens"]


class ImagePrompt(list[int]):
    """Token ids of a prompt that knows its images, and reads them only when it is answered.

    Args:
      ids: the tokens.
      row: whose images they stand for; None: of none.
      processor: makes their tiles.
    """

    def __init__(
        self,
        ids: Iterable[int] = (),
        row: Row | None = None,
        processor: ImageProcessor | None = None,
    ):
        super().__init__(ids)
        self._row, self._processor = row, processor

    def read_pixels(self) -> np.ndarray:
        """The tiles of the images, (tiles, height, width, channels).

        Raises:
          DataError: an image cannot be read.
        """
        row, processor = self._row, self._processor
        if row is None or processor is None:
            return np.zeros((0, 1, 1, 3), np.float32)
        tiles = [processor.tiles(open_image(path, row.origin)) for path in row.images]
        return np.concatenate([np.zeros((0, *processor.size, 3), np.float32), *tiles])


def image_processor(session: Session, max_tiles: int | None) -> ImageProcessor:
    """What makes images into numbers, as the model's folder says.

    Args:
      session: of a model of images.
      max_tiles: of an image; None: as the folder says.

    Raises:
      CheckpointError: the folder does not say it.
      ConfigError: images of another size than the model takes, or an impossible number of tiles.
    """
    base = session.base
    tiled = isinstance(base.config, InternVLConfig)
    vision = base.config.vision if tiled else base.config
    processor = ImageProcessor.from_folder(base.source, tiled=tiled)
    if processor.size != vision.image_size or vision.num_channels != 3:
        raise ConfigError(
            f"The image processor of {base.source} makes images of {processor.size} in 3 channels, "
            f"the model takes {vision.image_size} in {vision.num_channels}. Correct size in "
            "preprocessor_config.json."
        )
    if max_tiles is not None and tiled:
        least = min(processor.least, max(max_tiles, 1))
        processor = dataclasses.replace(processor, most=max_tiles, least=least)
    return processor


def encode_images(
    session: Session, rows: Sequence[Any], options: DataOptions
) -> tuple[Sequence[Any], Any]:
    """Images to classify: their examples, and what makes a batch of them.

    Raises:
      DataError: an image that cannot be read, or a label that is not learnt.
      ConfigError: see `image_processor`.
    """
    assert session.task is not None
    images = [row for row in rows if isinstance(row, ImageRow)]
    examples = encode_image_rows(images, names=session.task.names)
    processor = image_processor(session, options.max_tiles)
    return examples, functools.partial(pad_labelled_images, processor=processor)


def encode_image_texts(
    session: Session, rows: Sequence[Row], options: DataOptions, limit: int
) -> tuple[Sequence[Row], Sequence[Any], Any]:
    """Rows of text and images: themselves with image tokens in place, examples, and their batches.

    Raises:
      DataError: a row that does not fit, or an image that cannot be read.
      ConfigError: packing or truncation, which would tear images from their tokens.
    """
    if options.packing or options.truncate is not None:
        raise ConfigError(
            f"data.packing={options.packing} and data.truncate={options.truncate} were given with "
            "a model of images; rows with images are neither packed nor cut. Leave both out."
        )
    words = image_tokens(session, options.max_tiles)
    placed = [words.place(row) for row in rows]
    plain = encode_rows(
        placed,
        session.tokenizer,
        max_length=limit,
        chat=options.chat,
        system=options.system,
        expand=words.expand,
    )
    examples = image_examples(placed, plain, words)
    for example in examples:
        given = example.tokens[None]
        check_images(session.base.config, given, [example.tiles], [example.origin])
    most = max(example.tiles for example in examples)
    pad = functools.partial(pad_image_examples, tiles=most, processor=words.processor)
    return placed, examples, pad


def image_tokens(session: Session, max_tiles: int | None) -> ImageTokens:
    """How images are written in the prompts of an InternVL.

    Args:
      session: of the model.
      max_tiles: see `image_processor`.

    Raises:
      ConfigError: see `ImageTokens.of` and `image_processor`.
    """
    config = session.base.config
    processor = image_processor(session, max_tiles)
    return ImageTokens.of(session.tokenizer, config.image_token_id, config.tile_tokens, processor)


def image_prompt(row: Row, *, words: ImageTokens, **how: Any) -> ImagePrompt:
    """The prompt of a row, as `prompt_tokens` makes it, with its images.

    Args:
      row: from `ImageTokens.place`.
      words: how images are written.
      **how: of `prompt_tokens`.

    Raises:
      DataError: see `prompt_tokens`, or the header of an image cannot be read.
    """
    ids = prompt_tokens(row, expand=words.expand, **how)
    return ImagePrompt(ids, row, words.processor)
