"""The table of model architectures: what a new one brings, and nothing else knows it by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from emloc_jax.errors import UnsupportedArchitectureError
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.decoder import Decoder
from emloc_jax.models.decoder_names import decoder_storage
from emloc_jax.models.encoder import Encoder
from emloc_jax.models.encoder_config import ENCODER_CLASSES, EncoderConfig
from emloc_jax.models.encoder_names import encoder_storage, fit_pooler
from emloc_jax.models.families import supported_architectures
from emloc_jax.models.flux import Flux
from emloc_jax.models.flux_config import FLUX_CLASSES, FluxConfig
from emloc_jax.models.flux_names import flux_storage
from emloc_jax.models.gpt2 import Gpt2
from emloc_jax.models.gpt2_config import GPT2_CLASSES, Gpt2Config
from emloc_jax.models.gpt2_names import gpt2_storage
from emloc_jax.models.hf_storage import HfStorage
from emloc_jax.models.internvl import InternVL
from emloc_jax.models.internvl_config import InternVLConfig
from emloc_jax.models.internvl_names import internvl_storage
from emloc_jax.models.vision_config import VISION_CLASSES, VisionConfig
from emloc_jax.models.vision_encoder import VisionEncoder
from emloc_jax.models.vision_names import fit_vision_pooler, vision_storage

__all__ = ["Architecture", "architecture_of", "architecture_of_config", "supported_classes"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One linen model and the Hugging Face families that it runs.

    Attributes:
        config: its frozen dataclass, with ``from_hf`` and ``to_hf``.
        model: its linen module, made as ``model(config, **options)``.
        storage: config to where its parameters lie in a checkpoint.
        model_types: ``model_type`` of its families.
        classes: the classes of transformers or diffusers that it runs.
        fit: ``(config, tensor names) -> config``, with what ``config.json`` leaves unsaid.
    """

    config: Any
    model: Any
    storage: Callable[[Any], HfStorage]
    model_types: tuple[str, ...]
    classes: tuple[str, ...]
    fit: Callable[[Any, Collection[str]], Any] = lambda config, names: config


_DECODERS = supported_architectures()
_TABLE = (
    Architecture(
        DecoderConfig, Decoder, decoder_storage, tuple(_DECODERS), tuple(_DECODERS.values())
    ),
    Architecture(Gpt2Config, Gpt2, gpt2_storage, ("gpt2",), GPT2_CLASSES),
    Architecture(
        EncoderConfig, Encoder, encoder_storage, ("bert", "roberta"), ENCODER_CLASSES, fit_pooler
    ),
    Architecture(
        VisionConfig,
        VisionEncoder,
        vision_storage,
        tuple(VISION_CLASSES),
        tuple(name for names in VISION_CLASSES.values() for name in names),
        fit_vision_pooler,
    ),
    Architecture(
        InternVLConfig,
        InternVL,
        internvl_storage,
        ("internvl",),
        ("InternVLForConditionalGeneration",),
    ),
    Architecture(FluxConfig, Flux, flux_storage, (), FLUX_CLASSES),
)


def supported_classes() -> tuple[str, ...]:
    """Every class of transformers and diffusers whose checkpoints are read.

    Returns:
        Their names, as ``architectures`` or ``_class_name`` in ``config.json`` have them.

    Example:
        >>> from emloc_jax.models import supported_classes
        >>> supported_classes()[-2:]
        ('InternVLForConditionalGeneration', 'FluxTransformer2DModel')
    """
    return tuple(name for architecture in _TABLE for name in architecture.classes)


def architecture_of(hf_config: Mapping[str, Any]) -> Architecture:
    """The row of the table for a ``config.json``.

    Args:
        hf_config: the parsed ``config.json``.

    Returns:
        The row, by ``model_type`` or, without one, by ``architectures``; of a diffusers model by
        ``_class_name``.

    Raises:
        UnsupportedArchitectureError: no row has it; the message lists the supported classes.
    """
    model_type = hf_config.get("model_type")
    named = list(hf_config.get("architectures") or ())
    if "_class_name" in hf_config:  # diffusers
        named, model_type = [hf_config["_class_name"]], None
    for row in _TABLE:
        if model_type in row.model_types or (model_type is None and set(named) & set(row.classes)):
            return row
    raise UnsupportedArchitectureError(
        f"A model with architectures={named!r} and model_type={model_type!r} was asked for. "
        f"Supported are: {', '.join(supported_classes())}. Use a model of one of these."
    )


def architecture_of_config(config: Any) -> Architecture:
    """The row of the table for a config dataclass.

    Args:
        config: of any model here.

    Returns:
        The row.

    Raises:
        UnsupportedArchitectureError: it is none of these.
    """
    for row in _TABLE:
        if isinstance(config, row.config):
            return row
    known = ", ".join(row.config.__name__ for row in _TABLE)
    raise UnsupportedArchitectureError(
        f"A config of type {type(config).__name__} was given; known are {known}. Use one of these."
    )
