"""Image models of every kind with a batch, a loss and masks: what the library's verbs take."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from emloc_jax.models import (
    VisionConfig,
    image_token_masks,
    layer_depths,
    model_from_config,
    stack_layers,
)
from emloc_jax.training import make_label_logits, make_label_loss, make_loss
from tests.models.torch_vision import images, our_config, our_params, prompts


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and one batch; the second row's tail, and the last tiles, are padding."""

    model: Any
    params: Any
    batch: dict[str, np.ndarray]
    inputs: tuple[Any, ...]
    make_loss: Callable[..., Any]
    mask: Callable[[Any], Any]


@functools.cache
def case(variant):
    config = our_config(variant)
    model = model_from_config(config, scan_layers=True)
    params = stack_layers(our_params(variant), layer_depths(config))
    if isinstance(config, VisionConfig):
        batch = {
            "pixels": images(variant, 4),
            "labels": np.array([0, 2, 1, 0], np.int32),
            "weights": np.array([1, 1, 1, 0], np.float32),  # the last row is padding
        }
        return Case(
            model,
            params,
            batch,
            (batch["pixels"],),
            lambda apply: make_label_loss(make_label_logits(apply)),
            lambda batch: batch["weights"] > 0,
        )
    tokens, segments, counts = prompts(variant, length=26)  # no size of a kernel
    pixels = images(variant, 6).reshape(2, 3, *images(variant, 1).shape[1:])
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": segments.astype(np.float32),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "segments": segments,
        "pixels": pixels,
        "tiles": (np.arange(3) < counts[:, None]).astype(np.int32),
    }
    inputs = (tokens, batch["positions"], segments, pixels)
    return Case(model, params, batch, inputs, make_loss, image_token_masks)
