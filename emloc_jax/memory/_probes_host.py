"""Facts of the host and of the place where runs are written, from the operating system."""

import contextlib
import importlib.metadata
import os
import shutil
from pathlib import Path

from threadpoolctl import threadpool_info

from emloc_jax.memory._doctor_facts import HostFacts, PlaceFacts
from emloc_jax.offload import container_memory, free_host_memory

__all__ = ["accelerator_signs", "host_facts", "installed_versions", "jax_plugins", "place_facts"]

_MEMINFO = Path("/proc/meminfo")
_MOUNTS = Path("/proc/mounts")
_ROOT = Path("/")
_SIGNS = (
    "dev/nvidia[0-9]*",
    "dev/kfd",  # AMD
    "dev/accel[0-9]*",  # TPU
    "usr/lib/wsl/lib/libcuda.so.1",  # NVIDIA below Windows, which has no device file
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
_OPTIONAL = ("torch",)


def host_facts() -> HostFacts:
    """Memory, processors and threads.

    Example:
      >>> facts = host_facts()
      >>> 0 < facts.free <= facts.total and facts.usable_cpus >= 1
      True
    """
    container = container_memory()
    pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    cpus = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    return HostFacts(
        total=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free=free_host_memory(),
        container_limit=None if container is None else container.limit,
        swap=_swap(),
        cpus=cpus,
        usable_cpus=usable,
        blas_threads=max(pools, default=None),
    )


def _swap() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "SwapTotal":
                return 1024 * int(value.split()[0])
    return None


def place_facts(folder: Path) -> PlaceFacts:
    """The disk under a folder that exists.

    Raises:
      OSError: there is no such folder.
    """
    folder = folder.resolve(strict=True)
    disk = shutil.disk_usage(folder)
    return PlaceFacts(str(folder), _file_system(folder), disk.total, disk.free)


def _file_system(folder: Path) -> str | None:
    """The kind of the last mount on the way to the folder."""
    best, kind = -1, None
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            _, point, name = line.split()[:3]
            mount = Path(point.replace("\\040", " "))
            if folder.is_relative_to(mount) and len(mount.parts) >= best:
                best, kind = len(mount.parts), name
    return kind


def accelerator_signs() -> tuple[str, ...]:
    """Device files of accelerators, whether JAX can use them or not."""
    with contextlib.suppress(OSError):
        return tuple(sorted(str(path) for sign in _SIGNS for path in _ROOT.glob(sign)))
    return ()


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages that matter, and of torch, which is not needed."""
    versions = {name: _version(name) for name in (*_PACKAGES, *_OPTIONAL)}
    return versions | {plugin: _version(plugin) for plugin in jax_plugins()}


def jax_plugins() -> tuple[str, ...]:
    """Installed packages that bring JAX a backend for an accelerator."""
    names = {d.metadata["Name"] or "" for d in importlib.metadata.distributions()}
    names = {name.lower().replace("_", "-") for name in names}
    found = {n for n in names if n.startswith("jax-") and n.endswith("-plugin")}
    return tuple(sorted(found | (names & {"libtpu", "jax-metal"})))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
