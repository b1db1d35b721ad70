"""Keys that every family's config.json has in common, read and refused in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.models.activations import activation

__all__ = [
    "as_tuple",
    "check_plain_sizes",
    "from_tuple",
    "refuse_options",
    "refuse_quantised",
    "required",
    "require_positive",
    "the_class",
]


def required(hf: Mapping[str, Any], key: str) -> int:
    """The size stored under a key.

    Args:
        hf: the parsed ``config.json``.
        key: its name.

    Returns:
        The number.

    Raises:
        ConfigError: it is missing, or no positive whole number.
    """
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise ConfigError(
            f"config.json needs {key!r} as a positive whole number, but it {found}. "
            "Take the file that came with the weights."
        )
    return value


def require_positive(config: Any, names: Sequence[str]) -> None:
    """Checks sizes of a config dataclass.

    Args:
        config: the config.
        names: attributes that must be positive whole numbers.

    Raises:
        ConfigError: the first of them that is not.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{name}={value!r} was given where a positive whole number is needed. "
                "Correct the config."
            )


def check_plain_sizes(config: Any) -> None:
    """Checks what the configs of GPT-2 and of the encoders have in common.

    Args:
        config: the config.

    Raises:
        ConfigError: a size is no positive whole number, or the heads do not share out the width.
        UnsupportedArchitectureError: its activation is not implemented.
    """
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
    require_positive(config, (*sizes, "max_position_embeddings"))
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"num_heads={config.num_heads} does not divide hidden_size={config.hidden_size}. "
            "Correct the config."
        )
    activation(config.hidden_act)


def the_class(hf: Mapping[str, Any], model_type: str, classes: Sequence[str]) -> str | None:
    """The class that ``architectures`` names; None: the key is absent.

    Args:
        hf: the parsed ``config.json``.
        model_type: of the family.
        classes: those of the family that are implemented.

    Returns:
        One of ``classes``, or None.

    Raises:
        UnsupportedArchitectureError: another class, or more than one.
    """
    named = list(hf.get("architectures") or ())
    if not named:
        return None
    if len(named) != 1 or named[0] not in classes or hf.get("model_type", model_type) != model_type:
        raise UnsupportedArchitectureError(
            f"A model with architectures={named!r} and model_type={hf.get('model_type')!r} was "
            f"asked for. Supported for {model_type!r} are: {', '.join(classes)}. "
            "Use a model of one of these."
        )
    return named[0]


def refuse_quantised(hf: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose weights are quantised.

    Args:
        hf: the parsed ``config.json``.

    Raises:
        UnsupportedArchitectureError: the file has a ``quantization_config``.
    """
    if hf.get("quantization_config"):
        method = dict(hf["quantization_config"]).get("quant_method")
        raise UnsupportedArchitectureError(
            f"The checkpoint is quantised (quant_method={method!r}); only unquantised "
            "safetensors and GGUF are read. Use the unquantised checkpoint."
        )


def refuse_options(hf: Mapping[str, Any], implemented: Mapping[str, Sequence[Any]]) -> None:
    """Refuses, by name, options whose value is not among those implemented.

    Args:
        hf: the parsed ``config.json``.
        implemented: key to its implemented values, the default first; an absent key is the default.

    Raises:
        UnsupportedArchitectureError: naming every such option.
    """
    refused = [
        f"{key}={hf[key]!r} (implemented: {', '.join(map(repr, values))})"
        for key, values in implemented.items()
        if key in hf and hf[key] not in values
    ]
    if refused:
        raise UnsupportedArchitectureError(
            f"config.json asks for {'; '.join(refused)}. Use a model without it."
        )


def as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    """Token ids, said as one or as many, as a tuple."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def from_tuple(ids: tuple[int, ...]) -> int | list[int] | None:
    """The inverse of ``as_tuple``, in the form that transformers writes."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
