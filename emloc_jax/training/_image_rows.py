"""Images to classify: folders of classes, or rows that name a file and a label."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training._image_file import image_size, open_image
from emloc_jax.training._image_parts import image_paths
from emloc_jax.training._image_processor import ImageProcessor
from emloc_jax.training._labelled_rows import label_of
from emloc_jax.training._records import Source, named_records
from emloc_jax.training._rows import fill

__all__ = [
    "ImageRow",
    "LabelledImage",
    "encode_image_rows",
    "pad_labelled_images",
    "read_image_folder",
    "read_image_rows",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRow:
    """One image to learn or test a classifier on.

    Attributes:
        origin: where the row stands, for messages.
        image: its file.
        label: the name of its class.
    """

    origin: str
    image: str
    label: str | float


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One row with the number of its class.

    Attributes:
        images: its file alone, read when a batch is made.
        label: () int32.
        origin: where the row stands.
    """

    images: tuple[str, ...]
    label: np.ndarray
    origin: str

    @property
    def tokens(self) -> np.ndarray:
        """All images are equally long, whatever is counted; batches need a length."""
        return np.zeros(1, np.int32)


def read_image_folder(folder: str | os.PathLike) -> list[ImageRow]:
    """The images in the subfolders of a folder; every subfolder is a class.

    Args:
        folder: of the classes. Files that Pillow does not know by their ending, and hidden ones,
            are left out.

    Returns:
        At least one row, in the order of names.

    Raises:
        DataError: no such folder, no subfolder in it, or a class without an image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder of images.")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not classes:
        raise DataError(
            f"{root}: the folder has no subfolders; a folder of images has one for every class."
        )
    known, rows = set(Image.registered_extensions()), []
    for kind in classes:
        files = [path for path in sorted(kind.rglob("*")) if path.suffix.lower() in known]
        files = [path for path in files if path.is_file() and path.name[0] != "."]
        if not files:
            raise DataError(f"{kind}: the class has no image in it. Put some there, or remove it.")
        rows += [ImageRow(str(path.relative_to(root)), str(path), kind.name) for path in files]
    logger.info("%s: %d images of %d classes", root, len(rows), len(classes))
    return rows


def read_image_rows(source: Source, *, columns: Mapping[str, str]) -> list[ImageRow]:
    """Rows that name an image and its class, of a file or any iterable of mappings.

    Args:
        source: as `read_rows` takes it; paths are relative to the file's folder.
        columns: `{"image": ..., "label": ...}` in terms of the source's own columns.

    Returns:
        At least one row.

    Raises:
        DataError: no row, or a malformed one (the message names file and line).
        ConfigError: missing or unknown keys in `columns`.

    Example:
        >>> rows = [{"file": "a.png", "kind": "cat"}]
        >>> read_image_rows(rows, columns={"image": "file", "label": "kind"})
        [ImageRow(origin='row 1', image='a.png', label='cat')]
    """
    if set(columns) != {"image", "label"}:
        raise ConfigError(
            f"columns has the keys {sorted(columns)}; images to classify need 'image' and 'label'."
        )
    records, name = named_records(source)
    folder = Path(source).parent if isinstance(source, str | os.PathLike) else Path()
    rows = []
    for origin, record in records:
        paths = image_paths(origin, fill(origin, record, columns["image"]), folder)
        if len(paths) != 1:
            raise DataError(f"{origin}: {len(paths)} images were given; a row has one.")
        label = label_of(origin, columns["label"], fill(origin, record, columns["label"]))
        rows.append(ImageRow(origin, paths[0], label))
    if not rows:
        raise DataError(f"{name}: no row found; at least one is needed.")
    return rows


def encode_image_rows(rows: Sequence[ImageRow], *, names: Sequence[str]) -> list[LabelledImage]:
    """Rows with the numbers of their classes; headers of all images are looked at.

    Args:
        rows: the rows.
        names: of the classes, by number.

    Raises:
        DataError: an image cannot be read, or a label is not among `names`.
    """
    numbers = {name: number for number, name in enumerate(names)}
    examples = []
    for row in rows:
        if str(row.label) not in numbers:
            known = ", ".join(list(numbers)[:10]) + (", …" if len(numbers) > 10 else "")
            raise DataError(
                f"{row.origin}: the label {row.label!r} is none of the {len(numbers)} that are "
                f"learnt ({known}). Labels are those of the training rows."
            )
        image_size(row.image, row.origin)
        label = np.asarray(numbers[str(row.label)], np.int32)
        examples.append(LabelledImage((row.image,), label, row.origin))
    return examples


def pad_labelled_images(
    examples: Sequence[LabelledImage], *, batch_size: int, length: int, processor: ImageProcessor
) -> dict[str, np.ndarray]:
    """One batch; missing rows are zeros.

    Args:
        examples: at least one.
        batch_size: rows of the batch.
        length: unused: images have no length.
        processor: makes the pixels.

    Returns:
        `pixels` (batch_size, height, width, 3) float32, `labels` (batch_size,) int32 and `weights`
        (batch_size,) float32, 1 for a row and 0 where one is missing.

    Raises:
        DataError: an image cannot be read.
    """
    del length
    batch: dict[str, np.ndarray] = {
        "pixels": np.zeros((batch_size, *processor.size, 3), np.float32),
        "labels": np.zeros(batch_size, np.int32),
        "weights": np.zeros(batch_size, np.float32),
    }
    for row, example in enumerate(examples):
        image = open_image(example.images[0], example.origin)
        batch["pixels"][row] = processor.pixels(image)
        batch["labels"][row], batch["weights"][row] = example.label, 1
    return batch
