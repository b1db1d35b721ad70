"""Bytes written: files that a stage left behind, and what the kernel sent to the disk."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["FileMark", "bytes_left", "files_in", "storage_bytes"]

_IO = Path("/proc/self/io")


class FileMark(NamedTuple):
    """What tells one file from another of the same name."""

    inode: int
    size: int


def files_in(folder: Path | None) -> dict[str, FileMark] | None:
    """Every file below a folder; None: no folder was given, or it cannot be read."""
    if folder is None:
        return None
    found = {}
    try:
        for home, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(home, name)
                with contextlib.suppress(FileNotFoundError):  # another thread removed it
                    info = os.lstat(path)
                    found[path] = FileMark(info.st_ino, info.st_size)
    except OSError:
        return None
    return found


def bytes_left(
    before: Mapping[str, FileMark] | None, after: Mapping[str, FileMark] | None
) -> int | None:
    """Bytes of the files that appeared: new or replaced ones whole, others by what they grew.

    Exact, on every system; files that came and went in between are not in it.

    Example:
      >>> bytes_left({"log": FileMark(1, 10)}, {"log": FileMark(1, 15), "new": FileMark(2, 100)})
      105
    """
    if before is None or after is None:
        return None
    total = 0
    for path, mark in after.items():
        old = before.get(path)
        if old is not None and old.inode == mark.inode:
            total += max(0, mark.size - old.size)
        else:
            total += mark.size
    return total


def storage_bytes() -> int | None:
    """Bytes this process caused to be sent to disks since it started; None: not told.

    Linux counts whole pages when they become dirty, temporary files included; nothing for files
    that live in memory (tmpfs).
    """
    with contextlib.suppress(OSError, ValueError):
        for line in _IO.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "write_bytes":
                return int(value)
    return None
