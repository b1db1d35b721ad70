"""The families of Hugging Face models that one decoder covers, and what each leaves unsaid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emloc_jax.errors import UnsupportedArchitectureError

__all__ = ["Family", "family_of", "supported_architectures"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers.

    Attributes:
        model_type: ``model_type`` in ``config.json``.
        architecture: the causal language model class named in ``architectures``.
        num_kv_heads: key/value heads when the key is absent; None: as many as query heads.
        head_dim: head width when the key is absent; None: ``hidden_size / num_attention_heads``.
        max_position_embeddings: context when the key is absent.
        sliding_window: window when the key is absent.
        always_sliding: a ``sliding_window`` in the config applies to every layer.
        qkv_bias: biases on q, k, v; None: as ``attention_bias`` says, on o as well.
        mlp_bias: the family reads ``mlp_bias``.
        qk_norm: queries and keys are normalised per head.
    """

    model_type: str
    architecture: str
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    always_sliding: bool = False
    qkv_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False


_FAMILIES = (
    Family("llama", "LlamaForCausalLM", mlp_bias=True),
    Family(
        "mistral",
        "MistralForCausalLM",
        num_kv_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
        always_sliding=True,
        qkv_bias=False,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        num_kv_heads=32,
        max_position_embeddings=32768,
        qkv_bias=True,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        qk_norm=True,
    ),
)


def supported_architectures() -> dict[str, str]:
    """The families of ``Decoder``; ``supported_classes`` names all models.

    Returns:
        HF's ``model_type`` to the class in ``architectures``. Llama 2, 3 and 3.1, SmolLM2 and
        DeepSeek-Coder are all ``llama``; Qwen2.5 is ``qwen2``.

    Example:
        >>> from emloc_jax.models import supported_architectures
        >>> supported_architectures()["qwen2"]
        'Qwen2ForCausalLM'
    """
    return {family.model_type: family.architecture for family in _FAMILIES}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``, by ``model_type`` and, where given, ``architectures``.

    Args:
        hf_config: the parsed ``config.json``.

    Returns:
        The family.

    Raises:
        UnsupportedArchitectureError: neither key, an unknown family, or another class of a known
            family (a classifier, say).
    """
    model_type = hf_config.get("model_type")
    architectures = list(hf_config.get("architectures") or ())
    known = ", ".join(f"{f.architecture} (model_type {f.model_type!r})" for f in _FAMILIES)
    for family in _FAMILIES:
        by_type = model_type == family.model_type
        by_class = architectures == [family.architecture]
        if (by_type and (by_class or not architectures)) or (by_class and model_type is None):
            return family
    raise UnsupportedArchitectureError(
        f"A model with architectures={architectures!r} and model_type={model_type!r} was asked "
        f"for. Supported are: {known}. Use a model of one of these."
    )
