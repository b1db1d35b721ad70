"""Whether Adam's moments find room on the host."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_jax.errors import PlanError
from emloc_jax.kernels import flatten_leaves
from emloc_jax.offload._container import container_memory
from emloc_jax.offload._update_programs import UpdatePrograms

__all__ = ["check_host_memory", "free_host_memory", "moment_bytes"]

_MEMINFO = Path("/proc/meminfo")


def moment_bytes(
    updates: UpdatePrograms, cores: Mapping[str, tuple[int, int]], shapes: Mapping[str, Any]
) -> int:
    """Bytes of the moments (two of fp32) that a block keeps on the host.

    Args:
      updates: of the block; says what is sent.
      cores: path to the size of a compressed gradient.
      shapes: of the block's parameters.
    """
    leaves = flatten_leaves(shapes)
    return sum(8 * math.prod(cores.get(path, leaves[path].shape)) for path in updates.sent)


def check_host_memory(needed: int, limit: int | None) -> None:
    """Refuses moments that the host has no room for, before any is made.

    Args:
      needed: bytes.
      limit: bytes that may be used; None: what is free.

    Raises:
      PlanError: they do not fit.
    """
    free = free_host_memory() if limit is None else limit
    if needed > free:
        source = "is free there" if limit is None else "`host_memory` allows"
        raise PlanError(
            f"Adam's moments need {needed / 1e9:.3g} GB on the host, and {free / 1e9:.3g} GB "
            f"{source}. Make the subspace smaller, compress more kernels, or freeze some."
        )


def free_host_memory() -> int:
    """Bytes that can be had without swapping, within the control group's limit if there is one.

    Where the operating system does not say: all memory of the machine.

    Example:
      >>> free_host_memory() > 2**20
      True
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                free = 1024 * int(value.split()[0])
    container = container_memory()
    return free if container is None else min(free, container.free)
