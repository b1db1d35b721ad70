"""From an image to the numbers that a model takes, as its folder says."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emloc_jax.errors import CheckpointError, ConfigError
from emloc_jax.training._tiles import cut_tiles, tile_grid

__all__ = ["ImageProcessor"]

_FILES = ("preprocessor_config.json", "processor_config.json")
_KEYS = "image_processor"  # under which transformers 5 keeps it in the second file
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# What the classes of transformers take where the file leaves it out: filter, mean and deviation.
_DEFAULTS = {"ViT": (2, *_HALF), "Siglip": (3, *_HALF), "GotOcr2": (3, *_CLIP)}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resizing, tiling and normalisation.

    Attributes:
        size: (height, width) of what the model takes: of an image, or of a tile.
        resample: Pillow's number of a filter: 2 bilinear, 3 bicubic.
        scale: that pixels 0 to 255 are multiplied with.
        mean: of each channel, taken off after that.
        deviation: of each channel, that the rest is divided by.
        least: smallest number of tiles of an image.
        most: largest number of tiles; 1: images are not tiled.

    Example:
        >>> processor = ImageProcessor(size=(4, 4), most=6)
        >>> image = Image.new("RGB", (24, 8), (255, 0, 0))
        >>> processor.pixels(image).shape, processor.tiles(image).shape
        ((4, 4, 3), (4, 4, 4, 3))
        >>> processor.pixels(image)[0, 0].tolist()
        [1.0, -1.0, -1.0]
    """

    size: tuple[int, int]
    resample: int = 2
    scale: float = 1 / 255
    mean: tuple[float, ...] = _HALF[0]
    deviation: tuple[float, ...] = _HALF[1]
    least: int = 1
    most: int = 1

    def __post_init__(self):
        if min(self.size) < 1 or not 1 <= self.least <= self.most or min(self.deviation) <= 0:
            raise ConfigError(
                f"Images of size {self.size} in {self.least} to {self.most} tiles, divided by "
                f"{self.deviation}, were asked for; all must be positive. Correct the file."
            )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, *, tiled: bool = False) -> ImageProcessor:
        """The processor of a Hugging Face folder.

        Args:
            folder: with ``preprocessor_config.json`` (or ``processor_config.json``).
            tiled: the model takes tiles, as InternVL does; its own file need not say so.

        Raises:
            CheckpointError: neither file is there, or it cannot be read.
            ConfigError: it asks for what is not implemented; the message names it.
        """
        for name in _FILES:
            file = Path(folder) / name
            if not file.is_file():
                continue
            try:
                said = json.loads(file.read_text(encoding="utf-8"))
                said = said.get(_KEYS) if name == _FILES[1] else said
            except (ValueError, AttributeError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}. Get it again.") from error
            if said:
                return cls.from_hf(said, tiled=tiled)
        raise CheckpointError(
            f"{folder} holds no {_FILES[0]}, which says how images are made into numbers. Put the "
            "file of the pretrained model there."
        )

    @classmethod
    def from_hf(cls, said: Mapping[str, Any], *, tiled: bool = False) -> ImageProcessor:
        """The processor that ``preprocessor_config.json`` describes.

        Args:
            said: the parsed file.
            tiled: see ``from_folder``.

        Raises:
            ConfigError: see ``from_folder``.
        """
        kind = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "ViT")
        known = next((name for name in _DEFAULTS if kind.startswith(name)), None)
        refused = {"do_resize": False, "do_center_crop": True, "do_pad": True}
        bad = [f"{key}={value}" for key, value in refused.items() if said.get(key) is value]
        bad += [] if known else [f"image_processor_type={kind!r}"]
        if bad:
            raise ConfigError(
                f"The image processor asks for {', '.join(bad)}, which is not implemented; those "
                f"of {', '.join(_DEFAULTS)} are, which resize and normalise. Use such a model."
            )
        resample, mean, deviation = _DEFAULTS[known or "ViT"]
        plain = said.get("do_normalize", True) is False
        return cls(
            size=_size(said.get("size", 384 if known == "GotOcr2" else 224)),
            resample=int(said.get("resample", resample)),
            scale=said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0,
            mean=(0.0,) * 3 if plain else tuple(said.get("image_mean") or mean),
            deviation=(1.0,) * 3 if plain else tuple(said.get("image_std") or deviation),
            least=int(said.get("min_patches", 1)) if tiled else 1,
            most=int(said.get("max_patches", 12)) if tiled else 1,
        )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """A whole image in the model's size.

        Args:
            image: in RGB.

        Returns:
            (height, width, 3) float32.
        """
        high, wide = self.size
        return self._normalise(image.resize((wide, high), self.resample))

    def tiles(self, image: Image.Image) -> np.ndarray:
        """The tiles of an image, as many as ``tile_count`` says; see ``cut_tiles``.

        Args:
            image: in RGB.

        Returns:
            (tiles, height, width, 3) float32.
        """
        if self.most == 1:
            return self.pixels(image)[None]
        grid = self._grid(image.height, image.width)
        tiles = cut_tiles(image, grid, self.size, resample=self.resample)
        return np.stack([self._normalise(tile) for tile in tiles])

    def tile_count(self, height: int, width: int) -> int:
        """Tiles of an image of this size, the small whole image included.

        Example:
            >>> ImageProcessor(size=(448, 448), most=12).tile_count(300, 600)
            3
        """
        rows, columns = self._grid(height, width)
        return rows * columns + (rows * columns > 1)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if self.most == 1:
            return 1, 1
        return tile_grid(height, width, self.size, least=self.least, most=self.most)

    def _normalise(self, image: Image.Image) -> np.ndarray:
        numbers = np.asarray(image, np.float32) * np.float32(self.scale)
        mean, deviation = np.asarray([self.mean, self.deviation], np.float32)
        return (numbers - mean) / deviation


def _size(said: Any) -> tuple[int, int]:
    if isinstance(said, int):
        return said, said
    if isinstance(said, Mapping) and {"height", "width"} <= set(said):
        return int(said["height"]), int(said["width"])
    raise ConfigError(
        f"The image processor asks for size={said!r}; only a height and a width are implemented, "
        "which every image is resized to."
    )
