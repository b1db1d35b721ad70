"""Whether prompts and their images belong together, and which tokens of a batch are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emloc_jax.errors import DataError
from emloc_jax.models.internvl_config import InternVLConfig

__all__ = ["check_images", "image_token_masks"]


def check_images(
    config: InternVLConfig, tokens: Any, tiles: Sequence[int], origins: Sequence[str] = ()
) -> None:
    """Refuses rows whose image tokens are not as many as their tiles need.

    Args:
        config: of the model.
        tokens: (B, T) int, on the host.
        tiles: of each row, those that it really has.
        origins: where the rows stand, for the message.

    Raises:
        DataError: a row with more or fewer image tokens than ``tile_tokens`` per tile.

    Example:
        >>> import numpy as np
        >>> from emloc_jax.models import DecoderConfig, InternVLConfig, VisionConfig, check_images
        >>> vision = VisionConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4,
        ...                       model_type="internvl_vision", image_size=(16, 16),
        ...                       patch_size=(4, 4), final_norm=False)
        >>> text = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                      num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> check_images(InternVLConfig(vision, text, image_token_id=31), np.array([[1, 31]]), [1])
        Traceback (most recent call last):
        emloc_jax.errors.DataError: row 1: 1 image tokens for 1 tiles of 4 tokens each. ...
    """
    found = (np.asarray(tokens) == config.image_token_id).sum(axis=1)
    for row, (count, own) in enumerate(zip(found, tiles, strict=True)):
        if count != own * config.tile_tokens:
            where = origins[row] if row < len(origins) else f"row {row + 1}"
            raise DataError(
                f"{where}: {count} image tokens for {own} tiles of {config.tile_tokens} tokens "
                "each. Every image of a prompt is said by exactly its own tokens; make rows with "
                "encode_rows and ImageTokens."
            )


def image_token_masks(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Masks for calibration: which tokens of each part of an InternVL are real.

    Args:
        batch: with ``segments`` (B, T), 0 on padding, and ``tiles`` (B, P), 0 on tiles that a row
            does not use.

    Returns:
        Regular expression of kernel paths to bool mask, for ``calibrate(mask=…)``.

    Example:
        >>> import numpy as np
        >>> from emloc_jax.models import image_token_masks
        >>> batch = {"segments": np.array([[1, 1, 0]]), "tiles": np.array([[1, 0]])}
        >>> {part: mask.tolist() for part, mask in image_token_masks(batch).items()}
        {'(vision|projector)/.*': [True, False], '.*': [[True, True, False]]}
    """
    # The encoder and the projector see all tiles of all rows in one axis.
    return {"(vision|projector)/.*": batch["tiles"].reshape(-1) > 0, ".*": batch["segments"] > 0}
