"""Rows of text and images as tokens: every image becomes as many tokens as its tiles have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training._encode import Example
from emloc_jax.training._image_file import image_size, open_image
from emloc_jax.training._image_parts import IMAGE
from emloc_jax.training._image_processor import ImageProcessor
from emloc_jax.training._padding import pad_examples
from emloc_jax.training._rows import Row

__all__ = ["ImageExample", "ImageTokens", "image_examples", "pad_image_examples"]


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """How images are written in a prompt: `begin`, then `per_tile` times `token` a tile, `end`.

    Attributes:
        token: the text of the image token.
        per_tile: image tokens of one tile.
        processor: tells the tiles of an image.
        begin: text before an image's tokens.
        end: text behind them.

    Example:
        >>> words = ImageTokens("<IMG_CONTEXT>", 256, ImageProcessor(size=(448, 448), most=12))
        >>> words.place(Row("row 1", prompt="Which animal?", completion="A cat", images=("a.png",)))
        Row(origin='row 1', prompt='<IMG_CONTEXT>\\nWhich animal?', completion='A cat', ...)
    """

    token: str
    per_tile: int
    processor: ImageProcessor
    begin: str = "<img>"
    end: str = "</img>"

    @classmethod
    def of(cls, tokenizer: Any, token_id: int, per_tile: int, processor: ImageProcessor) -> Any:
        """The words that a tokenizer knows.

        Args:
            tokenizer: a Hugging Face tokenizer; it may name `start_image_token` and
                `end_image_token`.
            token_id: number of the image token.
            per_tile: see the class.
            processor: see the class.

        Raises:
            ConfigError: the tokenizer does not know one of the three words as one token.
        """
        begin = getattr(tokenizer, "start_image_token", None) or cls.begin
        end = getattr(tokenizer, "end_image_token", None) or cls.end
        token = tokenizer.convert_ids_to_tokens(token_id)
        for word in (token, begin, end):
            ids = [] if word is None else tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ConfigError(
                    f"The tokenizer reads {word!r} as {len(ids)} tokens; the words around images "
                    f"({token!r}, {begin!r}, {end!r}) must be one token each. Take the tokenizer "
                    "that came with the weights."
                )
        return cls(token, per_tile, processor, begin, end)

    def place(self, row: Row) -> Row:
        """The row with one image token in its text where each image stands.

        An image whose place is not said by `<image>` stands before the text, or before that of
        the first user turn.

        Args:
            row: as read.

        Raises:
            DataError: as many places as images are not there.
        """
        texts = [row.prompt or "", row.completion or ""] if row.messages is None else []
        texts += [turn["content"] for turn in row.messages or ()]
        texts = [text.replace(IMAGE, self.token) for text in texts]
        found = sum(text.count(self.token) for text in texts)
        if found == 0 and row.images:
            first = 0
            if row.messages is not None:
                roles = [turn["role"] for turn in row.messages]
                first = roles.index("user") if "user" in roles else 0
            texts[first] = f"{self.token}\n" * len(row.images) + texts[first]
        elif found != len(row.images):
            raise DataError(
                f"{row.origin}: the text has {found} places for images ({IMAGE}), the row has "
                f"{len(row.images)} images. Name a file for every place."
            )
        if row.messages is None:
            return dataclasses.replace(row, prompt=texts[0], completion=texts[1])
        turns = zip(row.messages, texts, strict=True)
        placed = tuple({**turn, "content": text} for turn, text in turns)
        return dataclasses.replace(row, messages=placed)

    def expand(self, row: Row, texts: Sequence[str]) -> list[str]:
        """Texts of a row with all tokens of its images; for `encode_rows(expand=…)`.

        Args:
            row: from `place`.
            texts: that together hold one image token per image, or fewer if the last ones are not
                asked for.

        Raises:
            DataError: an image cannot be read, or the chat template lost or added image tokens.
        """
        counts = self.tile_counts(row)
        found = sum(text.count(self.token) for text in texts)
        if found != len(counts):
            raise DataError(
                f"{row.origin}: the chat template made {found} image tokens of {len(counts)} "
                "images. Use a template that leaves texts as they are."
            )
        left, expanded = list(counts), []
        for text in texts:
            first, *others = text.split(self.token)
            for other in others:
                first += self.begin + self.token * (self.per_tile * left.pop(0)) + self.end + other
            expanded.append(first)
        return expanded

    def tile_counts(self, row: Row) -> list[int]:
        """Tiles of every image of a row, from the headers of the files.

        Raises:
            DataError: an image cannot be read.
        """
        sizes = [image_size(path, row.origin) for path in row.images]
        return [self.processor.tile_count(*size) for size in sizes]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageExample(Example):
    """A tokenised row with its images.

    Attributes:
        images: their files, read when a batch is made.
        tiles: of all of them together.
    """

    images: tuple[str, ...] = ()
    tiles: int = 0


def image_examples(
    rows: Sequence[Row], examples: Sequence[Example], words: ImageTokens
) -> list[ImageExample]:
    """Tokenised rows with the images of their rows.

    Args:
        rows: from `ImageTokens.place`.
        examples: from `encode_rows` of these rows.
        words: that they were made with.
    """
    return [
        ImageExample(**vars(example), images=row.images, tiles=sum(words.tile_counts(row)))
        for row, example in zip(rows, examples, strict=True)
    ]


def pad_image_examples(
    examples: Sequence[ImageExample],
    *,
    batch_size: int,
    length: int,
    tiles: int,
    processor: ImageProcessor,
) -> dict[str, np.ndarray]:
    """One batch, as `pad_examples` makes it, with the tiles of all images.

    Args:
        examples: at least one.
        batch_size: rows of the batch.
        length: tokens of a row.
        tiles: of a row, P; those that a row lacks are zeros.
        processor: makes the tiles.

    Returns:
        What `pad_examples` gives; `pixels` (batch_size, P, height, width, 3) float32 and `tiles`
        (batch_size, P) int32, 1 for a tile and 0 where one is missing. With P = 0 neither.

    Raises:
        DataError: an image cannot be read, or a row has more tiles than P.
    """
    batch = pad_examples(examples, batch_size=batch_size, length=length)
    if tiles == 0:
        return batch
    batch["pixels"] = np.zeros((batch_size, tiles, *processor.size, 3), np.float32)
    batch["tiles"] = np.zeros((batch_size, tiles), np.int32)
    for row, example in enumerate(examples):
        if example.tiles > tiles:
            raise DataError(
                f"{example.origin}: the row has {example.tiles} tiles, a batch holds {tiles}; "
                "allow more, or fewer tiles per image."
            )
        first = 0
        for path in example.images:
            own = processor.tiles(open_image(path, example.origin))
            batch["pixels"][row, first : first + len(own)] = own
            first += len(own)
        batch["tiles"][row, :first] = 1
    return batch
