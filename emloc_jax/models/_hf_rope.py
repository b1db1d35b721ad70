"""The rotary keys of config.json, in the forms of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.models.rope import RopeScaling

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")


def read_rope(hf: Mapping[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding.

    transformers 4 writes ``rope_theta`` and ``rope_scaling`` (with ``type`` or ``rope_type``),
    transformers 5 writes both into ``rope_parameters``. Where both forms stand in one file,
    ``rope_scaling`` wins, as in transformers.

    Args:
        hf: the parsed ``config.json``.
        context: ``max_position_embeddings`` where the file does not say it.

    Returns:
        (theta, scaling or None).

    Raises:
        UnsupportedArchitectureError: a kind of scaling that is not implemented.
        ConfigError: a number that the scaling needs is missing or impossible.
    """
    parameters = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", hf.get("rope_theta"))
    theta = _positive(10000.0 if theta is None else theta, "rope_theta")
    partial = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedArchitectureError(
            f"partial_rotary_factor={partial!r} was asked for; only whole heads are rotated. "
            "Use a model without it."
        )
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UnsupportedArchitectureError(
            f"Rope scaling {kind!r} was asked for; implemented are 'default', 'linear' and "
            "'llama3'. Use a model with one of these."
        )
    factor = _positive(parameters.get("factor"), "factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = (_positive(parameters.get(key), key) for key in _LLAMA3_KEYS)
    if low >= high:
        raise ConfigError(
            f"low_freq_factor={low} and high_freq_factor={high} were given for 'llama3' rope "
            "scaling; the first must be the smaller one. Correct config.json."
        )
    original = parameters.get("original_max_position_embeddings")
    if original is None:
        original = hf.get("max_position_embeddings", context)
    return theta, RopeScaling("llama3", factor, low, high, original)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, the form that transformers 4 and 5 both read.

    Args:
        theta: base.
        scaling: or None.

    Returns:
        The two keys.
    """
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    numbers: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        numbers["type"] = "linear"  # transformers before 4.43 knows only this key
    else:
        for key in (*_LLAMA3_KEYS, "original_max_position_embeddings"):
            numbers[key] = getattr(scaling, key)
    return {"rope_theta": theta, "rope_scaling": numbers}


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        found = "is missing" if value is None else f"is {value!r}"
        raise ConfigError(
            f"The rotary embedding needs a positive number for {name!r}, but it {found}. "
            "Take the config.json that came with the weights."
        )
    return float(value)
