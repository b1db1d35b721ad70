"""Latent pictures as the tokens that FLUX reads: two by two pixels of all channels each."""

from __future__ import annotations

from typing import Any

import numpy as np

from emloc_jax.errors import DataError

__all__ = ["grid_ids", "pack_latents", "unpack_latents"]


def grid_ids(height: int, width: int, index: int = 0) -> np.ndarray:
    """Positions of the tokens of a picture: (index, row, column), row by row.

    Args:
        height: rows of tokens, which is half the rows of the latent picture.
        width: columns of tokens.
        index: what the first axis says; 0 in FLUX.1.

    Returns:
        (height · width, 3) fp32.

    Example:
        >>> from emloc_jax.models import grid_ids
        >>> grid_ids(2, 2).tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    ids = np.stack((np.full(rows.shape, index), rows, columns), axis=-1)
    return ids.reshape(-1, 3).astype(np.float32)


def pack_latents(pictures: Any) -> Any:
    """Joins every two by two pixels into one token; channels vary slowest, as in diffusers.

    Args:
        pictures: (N, H, W, c), H and W even.

    Returns:
        (N, H/2 · W/2, 4 c).

    Raises:
        DataError: another shape.

    Example:
        >>> import numpy as np
        >>> from emloc_jax.models import pack_latents, unpack_latents
        >>> pictures = np.arange(32.0).reshape(1, 4, 4, 2)
        >>> tokens = pack_latents(pictures)
        >>> tokens[0, 0].tolist()
        [0.0, 2.0, 8.0, 10.0, 1.0, 3.0, 9.0, 11.0]
        >>> bool((unpack_latents(tokens, 2, 2) == pictures).all())
        True
    """
    if pictures.ndim != 4 or pictures.shape[1] % 2 or pictures.shape[2] % 2:
        raise DataError(
            f"Latent pictures of shape {tuple(pictures.shape)} were given; they must be "
            "(N, H, W, channels) with even H and W."
        )
    count, height, width, channels = pictures.shape
    split = pictures.reshape(count, height // 2, 2, width // 2, 2, channels)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(count, -1, 4 * channels)


def unpack_latents(tokens: Any, height: int, width: int) -> Any:
    """The inverse of ``pack_latents``.

    Args:
        tokens: (N, height · width, 4 c).
        height: rows of tokens.
        width: columns of tokens.

    Returns:
        (N, 2 height, 2 width, c).
    """
    count, _, packed = tokens.shape
    split = tokens.reshape(count, height, width, packed // 4, 2, 2)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(count, 2 * height, 2 * width, packed // 4)
