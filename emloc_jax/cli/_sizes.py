"""Bytes: parsed, printed, and asked of compiled programs."""

import re
from typing import Any

import jax

from emloc_jax.errors import ConfigError

__all__ = ["format_bytes", "inference_memory", "parse_bytes", "peak", "step_memory"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes of a text such as '120MiB' or '2.5 GB'.

    Raises:
      ConfigError: not a size.

    Example:
      >>> parse_bytes("1.5KiB")
      1536
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(text))
    try:
        if match is not None:
            return int(float(match[1]) * _UNITS[match[2].upper()])
    except (KeyError, ValueError):
        pass
    raise ConfigError(f"'{text}' is not a size; write for example 120MiB, 2.5GB or 1048576.")


def format_bytes(count: float) -> str:
    """A size for people.

    Example:
      >>> format_bytes(3 * 2**20)
      '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def peak(compiled: Any) -> int:
    """Peak bytes of a compiled program: arguments, outputs and temporaries, donations once."""
    analysis = compiled.memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def step_memory(step: Any, state: Any, frozen: Any, batch: Any) -> int:
    """Peak bytes of a training step, from XLA's analysis of the compiled program."""
    return peak(step.lower(state, frozen, batch).compile())


def inference_memory(forward: Any, params: Any, batch: Any) -> int:
    """Peak bytes of `forward(params, batch)`, at the batch's shape."""
    return peak(jax.jit(forward).lower(params, batch).compile())
