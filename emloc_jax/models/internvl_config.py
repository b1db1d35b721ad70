"""The shape of an InternVL model, to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.models._hf_keys import refuse_options, refuse_quantised, required, the_class
from emloc_jax.models.activations import activation
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.vision_config import VisionConfig

__all__ = ["InternVLConfig"]

_CLASS = "InternVLForConditionalGeneration"
_IMPLEMENTED = {"vision_feature_layer": (-1,), "vision_feature_select_strategy": ("default",)}


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """An image encoder, a projector and a decoder, and how they meet.

    Hashable. What other code asks of a language model's config, it answers for its decoder.

    Attributes:
        vision: of the image encoder, an InternViT.
        text: of the decoder; ``tie_embeddings`` of it counts.
        image_token_id: the token that stands for one projected feature of an image.
        shuffle: so many neighbouring patches in each direction become one feature.
        projector_hidden_act: activation of the projector.

    Example:
        >>> from emloc_jax.models import DecoderConfig, InternVLConfig, VisionConfig
        >>> vision = VisionConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4,
        ...                       model_type="internvl_vision", image_size=(16, 16),
        ...                       patch_size=(4, 4), final_norm=False)
        >>> text = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                      num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> config = InternVLConfig(vision, text, image_token_id=31)
        >>> config.tile_tokens, config.layer_depths
        (4, {'vision/layers': 1, 'layers': 2})
        >>> InternVLConfig.from_hf(config.to_hf()) == config
        True
    """

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    shuffle: int = 2
    projector_hidden_act: str = "gelu"

    def __post_init__(self):
        activation(self.projector_hidden_act)
        if self.vision.model_type != "internvl_vision" or self.vision.head is not None:
            raise ConfigError(
                f"vision is a {self.vision.model_type} with head={self.vision.head!r}; InternVL "
                "needs a bare internvl_vision. Correct the config."
            )
        rows, columns = self.vision.grid
        if rows != columns or self.shuffle < 1 or rows % self.shuffle:
            raise ConfigError(
                f"A grid of {rows} × {columns} patches was given with shuffle={self.shuffle}; it "
                "must be square, and a multiple of shuffle. Correct image_size or patch_size."
            )
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigError(
                f"image_token_id={self.image_token_id} is no token of a vocabulary of "
                f"{self.text.vocab_size}. Correct the config."
            )

    @property
    def tile_tokens(self) -> int:
        """Image tokens of one tile, S."""
        rows, columns = self.vision.grid
        return rows * columns // self.shuffle**2

    @property
    def model_type(self) -> str:
        """HF's family name."""
        return "internvl"

    @property
    def class_name(self) -> str:
        """The class of transformers that this is."""
        return _CLASS

    @property
    def vocab_size(self) -> int:
        """Of the decoder."""
        return self.text.vocab_size

    @property
    def hidden_size(self) -> int:
        """Of the decoder."""
        return self.text.hidden_size

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return self.text.num_layers

    @property
    def layer_depths(self) -> dict[str, int]:
        """Blocks of both parts, by their place in the parameter tree."""
        return {"vision/layers": self.vision.num_layers, "layers": self.text.num_layers}

    @property
    def num_kv_heads(self) -> int:
        """Of the decoder."""
        return self.text.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Of the decoder."""
        return self.text.head_dim

    @property
    def max_position_embeddings(self) -> int:
        """Of the decoder."""
        return self.text.max_position_embeddings

    @property
    def tie_embeddings(self) -> bool:
        """Of the decoder."""
        return self.text.tie_embeddings

    @property
    def initializer_range(self) -> float:
        """Of the decoder."""
        return self.text.initializer_range

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> InternVLConfig:
        """The config that HF's ``config.json`` describes.

        Args:
            hf_config: the parsed ``config.json``.

        Returns:
            The equivalent ``InternVLConfig``.

        Raises:
            UnsupportedArchitectureError: another class, an image encoder or language model that is
                not implemented, or an option of them; the message names it.
            ConfigError: a size is missing or impossible.
        """
        hf = dict(hf_config)
        the_class(hf, "internvl", (_CLASS,))
        refuse_quantised(hf)
        refuse_options(hf, _IMPLEMENTED)
        vision, text = dict(hf.get("vision_config") or {}), dict(hf.get("text_config") or {})
        if vision.get("model_type", "internvl_vision") != "internvl_vision":
            raise UnsupportedArchitectureError(
                f"An InternVL with the vision tower {vision['model_type']!r} was asked for; only "
                "'internvl_vision' is implemented. Use a checkpoint of transformers' own InternVL."
            )
        vision = {**vision, "model_type": "internvl_vision"}
        vision.pop("architectures", None)
        for key in ("architectures", "tie_word_embeddings"):
            said = text.pop(key, None)
            if key == "tie_word_embeddings":
                text[key] = hf.get(key, True if said is None else said)
        text.setdefault("model_type", "qwen2")
        ratio = float(hf.get("downsample_ratio", 0.5))
        try:
            decoder = DecoderConfig.from_hf(text)
        except UnsupportedArchitectureError as error:
            raise UnsupportedArchitectureError(
                f"The language model of this InternVL is not implemented: {error}"
            ) from error
        config = cls(
            vision=VisionConfig.from_hf(vision),
            text=decoder,
            image_token_id=hf.get("image_token_id", 151667),
            shuffle=round(1 / ratio) if ratio > 0 else 0,
            projector_hidden_act=hf.get("projector_hidden_act", "gelu"),
        )
        if "image_seq_length" in hf and required(hf, "image_seq_length") != config.tile_tokens:
            raise ConfigError(
                f"image_seq_length={hf['image_seq_length']} was given, but a tile becomes "
                f"{config.tile_tokens} tokens. Take the config.json that came with the weights."
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model.

        Returns:
            A new dict of JSON values.
        """
        vision, text = self.vision.to_hf(), self.text.to_hf()
        del vision["architectures"], text["architectures"]
        return {
            "architectures": [_CLASS],
            "model_type": "internvl",
            "vision_config": vision,
            "text_config": text,
            "image_token_id": self.image_token_id,
            "image_seq_length": self.tile_tokens,
            "downsample_ratio": 1 / self.shuffle,
            "projector_hidden_act": self.projector_hidden_act,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": self.text.tie_embeddings,
        }
