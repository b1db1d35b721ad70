"""What a kind of model reads, and what a run computes of it: here, language models of text."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from emloc_jax.errors import ConfigError
from emloc_jax.memory._setting import Setting
from emloc_jax.training import Loss, make_loss

__all__ = ["TextKind"]


class TextKind:
    """A language model of text; other kinds say what is different.

    Args:
      config: of the model.

    Attributes:
      layers: regular expression of the kernels of all layers.
      streams: whether stages can read the original a block at a time.
      has_logits: whether there is a head whose logits are taken a chunk at a time.
      has_tiles: whether rows may have `tiles` of images.
      has_pictures: whether rows are pictures, of `latents` tokens.
    """

    layers = "layers/.*"
    streams = True
    has_logits = True
    has_tiles = False
    has_pictures = False

    def __init__(self, config: Any):
        self.config = config

    def image_tokens(self, setting: Setting) -> int:
        """Tokens of a row's images, which are read beside its `length`."""
        del setting
        return 0

    def most_text(self, setting: Setting) -> int | None:
        """The largest `length` beside the images of a row; None: there is no such limit."""
        return self.config.max_position_embeddings - self.image_tokens(setting)

    def check(self, setting: Setting) -> None:
        """Refuses a setting that rows of this kind cannot have.

        Raises:
          ConfigError: images for a model of text, no picture for a model of pictures, or streaming
            of a model that is held whole.
        """
        if setting.tiles or setting.latents:
            raise ConfigError(
                f"{setting.tiles} tiles and {setting.latents} latent tokens per row were given for "
                "a model of text. Leave tiles (InternVL), height and width (FLUX) out."
            )

    def inputs(self) -> dict[str, Any]:
        """Shapes of a small batch that every kernel sees, by the model's own names."""
        return {"tokens": jax.ShapeDtypeStruct((1, 8), np.int32)}

    def batch(self, setting: Setting, rows: int) -> dict[str, Any]:
        """Shapes of a batch, as the library's batches have them."""
        return setting.batch(rows)

    def mask(self, batch: Mapping[str, Any]) -> Any:
        """What of a batch counts in calibration, as `calibrate` takes it."""
        return batch["segments"] > 0

    def loss(self, apply: Callable[..., Any], chunk: int) -> Loss:
        """What is trained, evaluated and, two-sided, calibrated."""
        return make_loss(apply, chunk=chunk)

    def forward(self, apply: Callable[..., Any], variables: Any, batch: Mapping[str, Any]) -> Any:
        """What is run where calibration measures inputs alone."""
        names = ("positions", "segments", *self._images(batch))
        given = {name: batch[name] for name in names}
        return apply(variables, batch["tokens"], **given, method="hidden")

    def inference(
        self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]
    ) -> jax.Array:
        """What running the model computes: logits of the next token of each row."""
        given = {name: batch[name] for name in self._images(batch)}
        hidden = apply({"params": params}, batch["tokens"], **given, method="hidden")
        return apply({"params": params}, hidden[:, -1], method="logits")

    def inference_batch(self, setting: Setting, rows: int) -> dict[str, Any]:
        """Shapes of what `inference` reads."""
        batch = self.batch(setting, rows)
        return {name: batch[name] for name in ("tokens", *self._images(batch))}

    def _images(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        return ("pixels",) if "pixels" in batch else ()
