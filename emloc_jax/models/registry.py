"""From a Hugging Face config to the model that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.decoder import Decoder

__all__ = ["model_from_hf"]


def model_from_hf(hf_config: Mapping[str, Any], **options: Any) -> Decoder:
    """The decoder that a ``config.json`` describes, without its weights.

    Args:
        hf_config: the parsed ``config.json``.
        **options: of ``Decoder``: ``dtype``, ``param_dtype``, ``scan_layers``, ``remat``,
            ``attention_implementation``.

    Returns:
        The model; its ``config`` is ``DecoderConfig.from_hf(hf_config)``.

    Raises:
        UnsupportedArchitectureError: a family, or an option of one, that is not implemented; the
            message lists the supported ones.
        ConfigError: a size is missing or impossible.

    Example:
        >>> from emloc_jax.models import model_from_hf
        >>> model_from_hf({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
        Traceback (most recent call last):
        emloc_jax.errors.UnsupportedArchitectureError: A model with ... Supported are: ...
    """
    return Decoder(DecoderConfig.from_hf(hf_config), **options)
