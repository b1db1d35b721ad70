"""Images inside rows: their paths, and turns of a chat in parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_jax.errors import DataError

__all__ = ["IMAGE", "flat_turn", "image_paths"]

IMAGE = "<image>"  # where an image stands in a text
_SOURCES = ("image", "path", "url")  # keys of a part under which chat templates name a file


def image_paths(origin: str, value: Any, folder: Path) -> tuple[str, ...]:
    """The files that a row names, one path or a list of such.

    Args:
        origin: where the row stands, for the message.
        value: of the row.
        folder: that paths are relative to.

    Raises:
        DataError: something that is no path of a file.

    Example:
        >>> image_paths("row 1", "cat.png", Path("pictures"))
        ('pictures/cat.png',)
    """
    values = value if isinstance(value, list | tuple) else [value]
    for item in values:
        if not isinstance(item, str) or not item or "://" in item:
            raise DataError(
                f"{origin}: an image must be the path of a file, found {type(item).__name__} "
                f"{item!r:.60}."
            )
    return tuple(str(folder / item) for item in values)


def flat_turn(message: Any) -> tuple[Any, list[Any]]:
    """A turn with its parts as one text, and the images that stood in it.

    Args:
        message: a turn; one whose content is no list of parts is given back as it is.

    Returns:
        The turn, and what its image parts name.

    Example:
        >>> parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which animal?"}]
        >>> flat_turn({"role": "user", "content": parts})
        ({'role': 'user', 'content': '<image>\\nWhich animal?'}, ['a.png'])
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return message, []
    texts, images = [], []
    for part in content:
        if part.get("type") == "image":
            texts.append(f"{IMAGE}\n")
            images += [part[key] for key in _SOURCES if part.get(key)][:1]
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return message, []  # refused by whoever wants a text
    return {**message, "content": "".join(texts)}, images
