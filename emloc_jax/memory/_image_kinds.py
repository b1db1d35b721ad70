"""Models of images: InternVL, which reads tiles with text, and FLUX, which draws pictures."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from emloc_jax.errors import ConfigError
from emloc_jax.memory._model_kind import TextKind
from emloc_jax.memory._setting import Setting
from emloc_jax.models import CausalModel, Flux, InternVL, image_token_masks
from emloc_jax.training import Loss, make_flow_loss

__all__ = ["FlowKind", "TiledKind", "kind_of"]


class TiledKind(TextKind):
    """An InternVL: rows have `tiles` tiles of images, and `length` tokens of text beside theirs."""

    streams = False
    has_tiles = True

    def check(self, setting: Setting) -> None:
        """See `TextKind.check`."""
        if setting.latents:
            raise ConfigError(
                f"{setting.latents} latent tokens per row were given for an InternVL, whose images "
                "come as tiles of one size. Give tiles, and leave height and width out."
            )
        _refuse_streaming(setting, "an InternVL")

    def image_tokens(self, setting: Setting) -> int:
        """See `TextKind.image_tokens`."""
        return setting.tiles * self.config.tile_tokens

    def inputs(self) -> dict[str, Any]:
        """See `TextKind.inputs`."""
        return {**super().inputs(), "pixels": self._pixels(1, 1)}

    def batch(self, setting: Setting, rows: int) -> dict[str, Any]:
        """As `pad_image_examples` makes it."""
        length = setting.length + self.image_tokens(setting)
        batch = setting.replace(length=length).batch(rows)
        if setting.tiles:
            batch["pixels"] = self._pixels(rows, setting.tiles)
            batch["tiles"] = jax.ShapeDtypeStruct((rows, setting.tiles), np.int32)
        return batch

    def mask(self, batch: Mapping[str, Any]) -> Any:
        """See `TextKind.mask`."""
        return image_token_masks(batch) if "tiles" in batch else super().mask(batch)

    def _pixels(self, rows: int, tiles: int) -> jax.ShapeDtypeStruct:
        vision = self.config.vision
        shape = (rows, tiles, *vision.image_size, vision.num_channels)
        return jax.ShapeDtypeStruct(shape, np.float32)


class FlowKind(TextKind):
    """A FLUX: a row is a picture of `latents` tokens, and a prompt of `length` tokens."""

    layers = "(double|single)_layers/.*"
    streams = False
    has_logits = False
    has_pictures = True

    def most_text(self, setting: Setting) -> int | None:
        """See `TextKind.most_text`."""
        del setting
        return None

    def check(self, setting: Setting) -> None:
        """See `TextKind.check`."""
        if setting.tiles or not setting.latents:
            raise ConfigError(
                f"{setting.tiles} tiles and {setting.latents} latent tokens per row were given for "
                "a FLUX, which draws pictures. Give height and width in pixels (512 and 512, say; "
                "from Python, latents=1024), and leave tiles out."
            )
        _refuse_streaming(setting, "a FLUX")

    def inputs(self) -> dict[str, Any]:
        """See `TextKind.inputs`."""
        return self._conditions(1, 2, 2)

    def batch(self, setting: Setting, rows: int) -> dict[str, Any]:
        """As `FlowBatches` makes it of latents in fp32."""
        batch = self._conditions(rows, setting.latents, setting.length)
        return batch | {"noise": batch["latents"], "weights": _floats(rows)}

    def mask(self, batch: Mapping[str, Any]) -> Any:
        """See `TextKind.mask`."""
        return batch["weights"] > 0

    def loss(self, apply: Callable[..., Any], chunk: int) -> Loss:
        """The flow-matching loss; there are no logits to take in chunks."""
        del chunk
        return make_flow_loss(apply)

    def forward(self, apply: Callable[..., Any], variables: Any, batch: Mapping[str, Any]) -> Any:
        """The velocity."""
        return apply(variables, **{name: batch[name] for name in self.inputs()})

    def inference(
        self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]
    ) -> jax.Array:
        """The velocity at one time, of which a sampler takes as many as it has steps."""
        return apply({"params": params}, **batch)

    def inference_batch(self, setting: Setting, rows: int) -> dict[str, Any]:
        """See `TextKind.inference_batch`."""
        return self._conditions(rows, setting.latents, setting.length)

    def _conditions(self, rows: int, tokens: int, length: int) -> dict[str, Any]:
        c = self.config
        conditions = {
            "latents": _floats(rows, tokens, c.in_channels),
            "timesteps": _floats(rows),
            "prompt_embeds": _floats(rows, length, c.prompt_dim),
            "pooled_prompt_embeds": _floats(rows, c.pooled_dim),
            "image_ids": _floats(rows, tokens, len(c.axes_dims)),
        }
        return conditions | ({"guidance": _floats(rows)} if c.guidance_embeds else {})


def kind_of(model: Any, name: str = "the model") -> TextKind:
    """What a model reads and computes.

    Args:
      model: of room models.
      name: for the message.

    Raises:
      ConfigError: no kind that is planned.

    Example:
      >>> from emloc_jax.models import Flux, FluxConfig
      >>> kind_of(Flux(FluxConfig())).batch(Setting(length=512, latents=1024), 1)["latents"].shape
      (1, 1024, 64)
    """
    if isinstance(model, InternVL):
        return TiledKind(model.config)
    if isinstance(model, CausalModel):
        return TextKind(model.config)
    if isinstance(model, Flux):
        return FlowKind(model.config)
    raise ConfigError(
        f"{name} is a {type(model).__name__}; plans are for language models, InternVL and FLUX."
    )


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _refuse_streaming(setting: Setting, what: str) -> None:
    if setting.stream:
        raise ConfigError(
            f"stream=true was asked for {what}; models of images are held whole. Give stream=false."
        )
