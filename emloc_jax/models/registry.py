"""From a Hugging Face config to the model that runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from emloc_jax.models.architectures import architecture_of, architecture_of_config

__all__ = ["config_from_hf", "model_from_config", "model_from_hf"]


def config_from_hf(hf_config: Mapping[str, Any], names: Collection[str] | None = None) -> Any:
    """The config dataclass that a ``config.json`` describes.

    Args:
        hf_config: the parsed ``config.json``.
        names: of the checkpoint's tensors, which settle what the file leaves unsaid (whether a
            bare encoder has a pooler); None: not known.

    Returns:
        A config of this room, a ``DecoderConfig`` say.

    Raises:
        UnsupportedArchitectureError: a family, or an option of one, that is not implemented.
        ConfigError: a size is missing or impossible.

    Example:
        >>> from emloc_jax.models import config_from_hf
        >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
        >>> type(config_from_hf({"model_type": "gpt2", **sizes})).__name__
        'Gpt2Config'
    """
    row = architecture_of(hf_config)
    config = row.config.from_hf(hf_config)
    return config if names is None else row.fit(config, names)


def model_from_config(config: Any, **options: Any) -> Any:
    """The model of a config dataclass, without its weights.

    Args:
        config: of any model here, a ``DecoderConfig`` say.
        **options: ``dtype``, ``param_dtype``, ``scan_layers``, ``remat``,
            ``attention_implementation``.

    Returns:
        A model of this room, a ``Decoder`` say.
    """
    return architecture_of_config(config).model(config, **options)


def model_from_hf(hf_config: Mapping[str, Any], **options: Any) -> Any:
    """The model that a ``config.json`` describes, without its weights.

    Args:
        hf_config: the parsed ``config.json``.
        **options: see ``model_from_config``.

    Returns:
        A model of this room; its ``config`` is ``config_from_hf(hf_config)``.

    Raises:
        UnsupportedArchitectureError: a family, or an option of one, that is not implemented; the
            message lists the supported ones.
        ConfigError: a size is missing or impossible.

    Example:
        >>> from emloc_jax.models import model_from_hf
        >>> model_from_hf({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"})
        Traceback (most recent call last):
        emloc_jax.errors.UnsupportedArchitectureError: A model with ... Supported are: ...
    """
    return model_from_config(config_from_hf(hf_config), **options)
