"""Pictures and prompts that were encoded beforehand: a safetensors file, read and written."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from emloc_jax._files import new_file
from emloc_jax.errors import DataError
from emloc_jax.models import grid_ids, pack_latents

__all__ = ["LatentData", "read_latents", "write_latents"]

_NAMES = ("latents", "prompt_embeds", "pooled_prompt_embeds")


@dataclasses.dataclass(frozen=True)
class LatentData:
    """N pictures with their prompts.

    Attributes:
        latents: (N, T, C), packed, scaled as the model reads them.
        prompt_embeds: (N, S, E).
        pooled_prompt_embeds: (N, P).
        image_ids: (T, 3), the same for all pictures.
        origin: where they came from, for messages.

    Raises:
        DataError: shapes that do not belong together, no picture, or a number that is not finite.
    """

    latents: np.ndarray
    prompt_embeds: np.ndarray
    pooled_prompt_embeds: np.ndarray
    image_ids: np.ndarray
    origin: str = "the latents"

    def __post_init__(self):
        count = len(self.latents)
        for name, axes in zip(_NAMES, (3, 3, 2), strict=True):
            array = getattr(self, name)
            if array.ndim != axes or not array.size or len(array) != count:
                raise DataError(
                    f"{self.origin}: {name} has shape {array.shape}; it needs {axes} axes, the "
                    f"first of them {count}, as many as there are latents, and at least one."
                )
            if not np.issubdtype(array.dtype, np.floating):
                raise DataError(f"{self.origin}: {name} has type {array.dtype}; give floats.")
            if not np.isfinite(array).all():
                raise DataError(f"{self.origin}: {name} has infinite or NaN entries.")
        if self.image_ids.shape != (self.latents.shape[1], 3):
            raise DataError(
                f"{self.origin}: image_ids have shape {self.image_ids.shape}; for "
                f"{self.latents.shape[1]} tokens they need ({self.latents.shape[1]}, 3)."
            )

    def __len__(self) -> int:
        return len(self.latents)


def read_latents(path: str | PathLike[str]) -> LatentData:
    """Pictures of one size with their prompts, from a safetensors file of fp32 or fp16.

    It holds `latents`, either pictures (N, H, W, channels), which are packed two by two, or packed
    (N, T, C); `prompt_embeds` (N, S, E) and `pooled_prompt_embeds` (N, P). Packed latents of
    pictures that are not square say how many rows of tokens they have in `grid`, two integers.
    docs/diffusion.md shows how to make one with diffusers.

    Args:
        path: the file.

    Returns:
        Everything in fp32, with the position ids that belong to the shape.

    Raises:
        DataError: the file is missing or no such file; the message says what is wrong.

    Example:
        >>> import tempfile
        >>> rng = np.random.default_rng(0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_latents(f"{folder}/cats.safetensors", rng.normal(size=(2, 4, 6, 16)),
        ...                          rng.normal(size=(2, 8, 32)), rng.normal(size=(2, 12)))
        ...     read_latents(path).latents.shape
        (2, 6, 64)
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}. Give a safetensors file of latents.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no safetensors file of fp32 or fp16 arrays ({error!r}). Write it anew."
        ) from error
    missing = [name for name in _NAMES if name not in tensors]
    unknown = sorted(set(tensors) - {*_NAMES, "grid"})
    if missing or unknown:
        raise DataError(
            f"{path} lacks {', '.join(missing) or 'nothing'} and has the unknown tensors "
            f"{', '.join(unknown) or 'none'}; it must hold {', '.join(_NAMES)} and may hold grid."
        )
    arrays = [tensors[name] for name in _NAMES]
    latents, height, width = _packed(arrays[0], tensors.get("grid"), str(path))
    floats = (np.asarray(array, np.float32) for array in (latents, *arrays[1:]))
    return LatentData(*floats, image_ids=grid_ids(height, width), origin=str(path))


def write_latents(
    path: str | PathLike[str],
    latents: np.ndarray,
    prompt_embeds: np.ndarray,
    pooled_prompt_embeds: np.ndarray,
    *,
    grid: tuple[int, int] | None = None,
) -> Path:
    """Writes a file for `read_latents`, in fp32.

    Args:
        path: a new file.
        latents: (N, H, W, channels), or packed (N, T, C).
        prompt_embeds: (N, S, E).
        pooled_prompt_embeds: (N, P).
        grid: rows and columns of tokens, of packed latents that are not square.

    Returns:
        The path.

    Raises:
        DataError: shapes that do not belong together, or numbers that are not finite.
        OutputExistsError: the file exists.
    """
    path = Path(path)
    arrays = [np.ascontiguousarray(latents, np.float32)]
    arrays += [np.ascontiguousarray(x, np.float32) for x in (prompt_embeds, pooled_prompt_embeds)]
    tensors: dict[str, np.ndarray] = dict(zip(_NAMES, arrays, strict=True))
    if grid is not None:
        tensors["grid"] = np.asarray(grid, np.int32)
    packed, height, width = _packed(arrays[0], tensors.get("grid"), str(path))
    LatentData(packed, *arrays[1:], image_ids=grid_ids(height, width), origin=str(path))
    with new_file(path, needs=sum(array.nbytes for array in tensors.values())) as partial:
        save_file(tensors, partial)
    return path


def _packed(
    latents: np.ndarray, grid: np.ndarray | None, origin: str
) -> tuple[np.ndarray, int, int]:
    """Packed latents, and how many rows and columns of tokens they have."""
    if latents.ndim == 4 and not (latents.shape[1] % 2 or latents.shape[2] % 2):
        return pack_latents(latents), latents.shape[1] // 2, latents.shape[2] // 2
    if latents.ndim != 3:
        raise DataError(
            f"{origin}: latents have shape {latents.shape}; they are pictures (N, H, W, channels) "
            "with even H and W, or packed (N, T, C)."
        )
    tokens = latents.shape[1]
    if grid is None:
        side = int(round(tokens**0.5))
        grid = np.array([side, side])
    if grid.shape != (2,) or grid.min() < 1 or int(grid.prod()) != tokens:
        raise DataError(
            f"{origin}: {tokens} tokens cannot be laid out as {grid.tolist()} rows and columns. "
            "Say in `grid` how many rows and columns of tokens the pictures have."
        )
    return latents, int(grid[0]), int(grid[1])
