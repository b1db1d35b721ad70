"""Images from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from emloc_jax.errors import DataError

__all__ = ["image_size", "open_image"]


def open_image(path: str | Path, origin: str = "") -> Image.Image:
    """An image as a person sees it: turned as the camera says, in RGB.

    Args:
        path: of the file, in any format that Pillow reads; of an animation the first picture.
        origin: where the row stands that names it, for the message.

    Raises:
        DataError: the file is missing, no image, or damaged; the message names it.

    Example:
        >>> open_image("no such file.png", "rows.jsonl:3")
        Traceback (most recent call last):
        emloc_jax.errors.DataError: rows.jsonl:3: the image no such file.png cannot be read ...
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except _TROUBLE as error:
        raise _unreadable(path, origin, error) from error


def image_size(path: str | Path, origin: str = "") -> tuple[int, int]:
    """Height and width of an image as `open_image` gives it, from its header alone.

    Args:
        path: see `open_image`.
        origin: see `open_image`.

    Raises:
        DataError: see `open_image`; damage behind the header is not seen.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
    except _TROUBLE as error:
        raise _unreadable(path, origin, error) from error
    return (width, height) if turned else (height, width)


_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF
# What Pillow raises for damaged files is no one kind; a bomb is an image of absurd size.
_TROUBLE: Any = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def _unreadable(path: str | Path, origin: str, error: Exception) -> DataError:
    where = f"{origin}: " if origin else ""
    return DataError(
        f"{where}the image {path} cannot be read ({type(error).__name__}: {error}). Repair or "
        "remove it; paths are relative to the file that names them."
    )
