"""InternVL: an image encoder whose projected features take the places of image tokens."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.errors import DataError
from emloc_jax.models.context import Context
from emloc_jax.models.decoder import Decoder
from emloc_jax.models.internvl_config import InternVLConfig
from emloc_jax.models.projector import Projector, pixel_shuffle
from emloc_jax.models.vision_encoder import VisionEncoder

__all__ = ["InternVL"]


class InternVL(Decoder):
    """InternVL (Chen et al. 2024, arXiv 2404.16821; 2504.10479 for version 3), as in transformers.

    The parameter tree is a ``Decoder``'s with two parts more; ``scan_layers`` scans the blocks of
    the decoder and those of the image encoder::

        vision/...            a ``VisionEncoder``
        projector/norm/{scale, bias}
        projector/{linear_1, linear_2}/{kernel, bias}
        embed_tokens, layers, norm, lm_head         see ``Decoder``

    Every row has the same number of tiles, so that one compiled program serves all rows; those
    that a row does not use hold anything, and nothing reads them. The k-th image token of a row
    takes the k-th feature of its tiles. A row with more image tokens than features becomes NaN;
    ``check_images`` finds that, and too few, before a model runs.

    Attributes:
        config: the shapes of the three parts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import DecoderConfig, InternVL, InternVLConfig, VisionConfig
        >>> vision = VisionConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4,
        ...                       model_type="internvl_vision", image_size=(8, 8),
        ...                       patch_size=(4, 4), final_norm=False)
        >>> text = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                      num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> model = InternVL(InternVLConfig(vision, text, image_token_id=31))
        >>> tokens, pixels = jnp.array([[5, 31, 31, 7]]), jnp.zeros((1, 2, 8, 8, 3))
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens, pixels=pixels)["params"]
        >>> jax.jit(model.apply)({"params": params}, tokens, pixels=pixels).shape
        (1, 4, 32)
    """

    config: InternVLConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def decoder_config(self) -> Any:
        """The decoder's shape."""
        return self.config.text

    def setup(self):
        """Declares the parts of the decoder, the image encoder and the projector."""
        super().setup()
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        how = self.attention_implementation
        self.vision = VisionEncoder(
            c.vision,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention_implementation=how,
            **dtypes,
        )
        self.projector = Projector(
            c.hidden_size, c.projector_hidden_act, c.initializer_range, **dtypes
        )

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        pixels: Array | None = None,
    ) -> Array:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) int32.
            positions: see ``CausalModel``.
            segments: see ``CausalModel``.
            pixels: (B, P, height, width, channels), normalised tiles; None: no row has an image.

        Returns:
            (B, T, V) fp32.
        """
        return self.logits(self.hidden(tokens, positions, segments, pixels))

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        pixels: Array | None = None,
    ) -> Array:
        """The residual stream after the final norm; ``method='hidden'``.

        Args:
            tokens: see ``__call__``.
            positions: see ``__call__``.
            segments: see ``__call__``.
            pixels: see ``__call__``.

        Returns:
            (B, T, D) in ``dtype``.
        """
        context = self.context(tokens, positions, segments)

        def run(block: Any, x: Array, _: Any) -> Array:
            return block(x, context)

        x = self.embed(tokens, positions, segments, pixels)
        return self.norm(self._through_layers(run, x, remat=self.remat))

    def embed(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        pixels: Array | None = None,
    ) -> Array:
        """The tokens' rows of the embedding, features of tiles in place of image tokens.

        Args:
            tokens: see ``__call__``.
            positions: see ``__call__``.
            segments: see ``__call__``.
            pixels: see ``__call__``.

        Returns:
            (B, T, D) in ``dtype``; ``method='embed'``.
        """
        x = self.embed_tokens(tokens)
        if pixels is None:
            return x
        features = self.image_features(pixels)
        is_image = tokens == self.config.image_token_id
        # A place beyond the features is filled with NaN: a wrong prompt must not go unseen.
        place = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
        placed = jnp.take_along_axis(features, place[..., None], axis=1, mode="fill")
        return jnp.where(is_image[..., None], placed, x)

    def image_features(self, pixels: Array) -> Array:
        """What the image tokens of every row stand for; ``method='image_features'``.

        Args:
            pixels: (B, P, height, width, channels).

        Returns:
            (B, P · tile_tokens, D) in ``dtype``.

        Raises:
            DataError: the tiles have no axis of their own, or another size than the model.
        """
        if pixels.ndim != 5:
            raise DataError(
                f"Tiles of shape {tuple(pixels.shape)} were given; the model takes (batch, tiles, "
                "height, width, channels)."
            )
        batch, tiles = pixels.shape[:2]
        patches = self.vision.hidden(pixels.reshape(batch * tiles, *pixels.shape[2:]))
        grid = patches[:, 1:].reshape(batch * tiles, *self.config.vision.grid, -1)
        shuffled = pixel_shuffle(grid, self.config.shuffle)
        features = self.projector(shuffled.reshape(batch * tiles, -1, shuffled.shape[-1]))
        return features.reshape(batch, -1, features.shape[-1])

    @nn.nowrap
    def context(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        pixels: Array | None = None,
    ) -> Context:
        """Rotary tables and the mask of whole sequences."""
        return super().context(tokens, positions, segments)
