"""Sizes as people write and read them."""

import re

from emloc_jax.errors import ConfigError

__all__ = ["format_bytes", "parse_bytes"]

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
