"""The memory limit that a container, or any other control group, sets on this process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["ContainerMemory", "container_memory"]

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 62  # version 1 writes a number close to 2**63
# Limit, use, and the line of memory.stat with cached files that go when memory is wanted.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class ContainerMemory(NamedTuple):
    """A control group's memory.

    Attributes:
      limit: bytes that its processes may use together.
      free: of them unused, or used for cached files only.
    """

    limit: int
    free: int


def container_memory(root: Path = _ROOT, own: Path = _OWN) -> ContainerMemory | None:
    """The tightest limit of this process's control groups, of version 1 or 2; None: no limit.

    Args:
      root: where control groups are mounted.
      own: file that names the groups of this process.

    Example:
      >>> found = container_memory()
      >>> found is None or 0 <= found.free <= found.limit
      True
    """
    found = [memory for folder in _folders(root, own) if (memory := _memory(folder)) is not None]
    if not found:
        return None
    return ContainerMemory(min(m.limit for m in found), min(m.free for m in found))


def _folders(root: Path, own: Path) -> Iterator[Path]:
    """Where limits of this process may stand: the mounts themselves, and its own groups' path."""
    yield from (root, root / "memory")
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            mount = root / "memory" if "memory" in kinds.split(",") else root
            if kinds and mount == root:
                continue  # of another controller
            folder = mount / path.strip("/")
            yield from (f for f in (folder, *folder.parents) if f.is_relative_to(mount))


def _memory(folder: Path) -> ContainerMemory | None:
    for limit, used, cache in _FILES:
        with contextlib.suppress(OSError, ValueError):
            text = (folder / limit).read_text(encoding="ascii").strip()
            if text == "max" or int(text) >= _UNLIMITED:
                return None
            in_use = int((folder / used).read_text(encoding="ascii"))
            free = int(text) - in_use + _line(folder / "memory.stat", cache)
            return ContainerMemory(int(text), min(int(text), max(0, free)))
    return None


def _line(file: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
