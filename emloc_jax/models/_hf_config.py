"""Reading and writing the keys of Hugging Face's config.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emloc_jax.errors import UnsupportedArchitectureError
from emloc_jax.models._hf_keys import as_tuple, from_tuple, refuse_quantised, required
from emloc_jax.models._hf_rope import read_rope, write_rope
from emloc_jax.models.families import Family, family_of, supported_architectures

if TYPE_CHECKING:
    from emloc_jax.models.config import DecoderConfig

_log = logging.getLogger(__name__)


def read_hf_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``DecoderConfig`` that a ``config.json`` stands for.

    Args:
        hf: the parsed ``config.json``.

    Returns:
        A dict for ``DecoderConfig(**...)``.

    Raises:
        UnsupportedArchitectureError: see ``DecoderConfig.from_hf``.
        ConfigError: a size is missing.
    """
    family = family_of(hf)
    _refuse_unimplemented(hf, family)
    theta, scaling = read_rope(hf, family.max_position_embeddings)
    hidden_size, num_heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    attention_bias = bool(hf.get("attention_bias", False))
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    return dict(
        model_type=family.model_type,
        vocab_size=required(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=required(hf, "intermediate_size"),
        num_layers=required(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads", family.num_kv_heads) or num_heads,
        head_dim=hf.get("head_dim", family.head_dim) or hidden_size // num_heads,
        max_position_embeddings=hf.get("max_position_embeddings", family.max_position_embeddings),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_sliding_window(hf, family),
        qkv_bias=qkv_bias,
        o_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=bool(hf.get("mlp_bias", False)) if family.mlp_bias else False,
        qk_norm=family.qk_norm,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=as_tuple(hf.get("eos_token_id")),
        pad_token_id=hf.get("pad_token_id"),
    )


def write_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` of a ``DecoderConfig``; the inverse of ``read_hf_config``.

    Args:
        config: any decoder config.

    Returns:
        A new dict of JSON values.

    Raises:
        UnsupportedArchitectureError: the family has no way to say one of the config's options.
    """
    hf: dict[str, Any] = {
        "architectures": [supported_architectures().get(config.model_type)],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **write_rope(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": from_tuple(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    family = family_of(hf)
    if family.qkv_bias is None:
        hf["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        hf["mlp_bias"] = config.mlp_bias
    if family.always_sliding:
        hf["sliding_window"] = config.sliding_window
    elif family.model_type.startswith("qwen"):
        hf["use_sliding_window"] = False
    _require_expressible(config, hf)
    return hf


def _require_expressible(config: DecoderConfig, hf: Mapping[str, Any]) -> None:
    again = read_hf_config(hf)
    lost = [name for name, value in again.items() if value != getattr(config, name)]
    if lost:
        options = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise UnsupportedArchitectureError(
            f"A config.json of model_type {config.model_type!r} was asked for, but that family "
            f"cannot say {options}. Choose another model_type, or drop the option."
        )


def _refuse_unimplemented(hf: Mapping[str, Any], family: Family) -> None:
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedArchitectureError(
            f"hidden_act={activation!r} was asked for; only 'silu' is implemented. "
            "Use a model with the gated silu MLP."
        )
    refuse_quantised(hf)
    if hf.get("attention_dropout"):
        # It acts in training only and is zero in every released model of these families.
        _log.warning("attention_dropout=%s is not applied.", hf["attention_dropout"])
    _refuse_mixed_attention(hf, family)


def _refuse_mixed_attention(hf: Mapping[str, Any], family: Family) -> None:
    """Refuses a window on some layers only; here it holds for every layer or for none."""
    kinds = set(hf.get("layer_types") or ())
    if family.always_sliding:
        windowed = _sliding_window(hf, family) is not None
        if kinds - {"sliding_attention" if windowed else "full_attention"}:
            raise UnsupportedArchitectureError(
                f"layer_types={sorted(kinds)!r} was asked for with sliding_window="
                f"{hf.get('sliding_window')!r}; {family.architecture} has one kind of attention "
                "for all layers. Drop layer_types."
            )
    elif kinds - {"full_attention"} or _uses_window(hf):
        raise UnsupportedArchitectureError(
            f"use_sliding_window={hf.get('use_sliding_window')!r} with layer_types="
            f"{sorted(kinds) or None!r} was asked for; sliding windows on some layers of "
            f"{family.architecture} are not implemented. Use a model with full attention."
        )


def _uses_window(hf: Mapping[str, Any]) -> bool:
    if not hf.get("use_sliding_window") or hf.get("layer_types"):
        return False  # layer_types, where given, has the last word
    first = hf.get("max_window_layers", 28)
    return hf.get("sliding_window", 4096) is not None and first < required(hf, "num_hidden_layers")


def _sliding_window(hf: Mapping[str, Any], family: Family) -> int | None:
    return hf.get("sliding_window", family.sliding_window) if family.always_sliding else None
