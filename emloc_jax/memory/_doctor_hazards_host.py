"""Hazards of the host: limits, swap, threads, disk, and settings of JAX that cost time."""

from emloc_jax._bytes import format_bytes
from emloc_jax.memory._doctor_facts import MachineFacts
from emloc_jax.memory._doctor_hazard import Advice

__all__ = [
    "HOST_HAZARDS",
    "blas_threads",
    "container_limit",
    "debug_flags",
    "disk_in_memory",
    "few_processors",
    "little_disk",
    "no_swap",
    "wide_types",
]

_IN_MEMORY = ("tmpfs", "ramfs")
_SMALL = 4  # processors; the command line then keeps LAPACK to one thread
_LITTLE_DISK = 10 * 10**9


def container_limit(facts: MachineFacts) -> Advice | None:
    """A container may use less than the machine has."""
    limit = facts.host.container_limit
    if limit is None or limit >= facts.host.total:
        return None
    return Advice(
        "warning",
        f"A container limits memory to {format_bytes(limit)}; the machine has "
        f"{format_bytes(facts.host.total)}.",
        "Beyond the limit the process is killed without a message; tools such as free and top show "
        "the machine.",
        "Go by the limit: emloc counts with it. Raise it if a plan needs more "
        "(docker run --memory).",
    )


def no_swap(facts: MachineFacts) -> Advice | None:
    """Nothing softens a peak."""
    if facts.host.swap != 0:
        return None
    return Advice(
        "note",
        "There is no swap space.",
        "A peak above main memory kills the process at once.",
        "Leave some of the free memory for the system when you choose a budget for the host.",
    )


def blas_threads(facts: MachineFacts) -> Advice | None:
    """Two pools of threads on few cores get in each other's way."""
    threads, cpus = facts.host.blas_threads, facts.host.usable_cpus
    if threads is None or cpus > _SMALL or threads <= 1:
        return None
    return Advice(
        "warning",
        f"The linear algebra library uses {threads} threads on {cpus} processors, beside XLA's.",
        "Decompositions can be many times slower: the two pools wait for each other.",
        "Set OPENBLAS_NUM_THREADS=1 in your own scripts; the command emloc does so by itself.",
    )


def few_processors(facts: MachineFacts) -> Advice | None:
    """The process is kept to a part of the machine."""
    host = facts.host
    if host.usable_cpus >= host.cpus:
        return None
    return Advice(
        "note",
        f"This process may run on {host.usable_cpus} of {host.cpus} processors.",
        "Adam on the host, decompositions and the CPU backend go by the smaller number.",
        "Ask for more (taskset, docker run --cpuset-cpus) if the host turns out to be the slow "
        "lane.",
    )


def disk_in_memory(facts: MachineFacts) -> Advice | None:
    """Files that are really memory."""
    if facts.place.file_system not in _IN_MEMORY:
        return None
    return Advice(
        "warning",
        f"{facts.place.folder} is a {facts.place.file_system}: its files live in main memory.",
        "Checkpoints, and what is moved to disk to save memory, use up that very memory.",
        "Choose an output on a disk.",
    )


def little_disk(facts: MachineFacts) -> Advice | None:
    """Hardly room for a run."""
    if facts.place.free >= _LITTLE_DISK:
        return None
    return Advice(
        "warning",
        f"{format_bytes(facts.place.free)} are free in {facts.place.folder}.",
        "A run writes an emulator, checkpoints and a merged model as large as the original.",
        "Free some space, or choose an output on another disk.",
    )


def wide_types(facts: MachineFacts) -> Advice | None:
    """64-bit types are on."""
    if not facts.jax.x64:
        return None
    return Advice(
        "warning",
        "jax_enable_x64 is on.",
        "Whatever has no dtype of its own becomes 64 bits wide: twice the memory, and slow on "
        "accelerators.",
        "Unset JAX_ENABLE_X64; the library computes in fp32 and bf16.",
    )


def debug_flags(facts: MachineFacts) -> Advice | None:
    """Settings for the search of a bug."""
    found = [name for name in ("debug_nans", "disable_jit") if getattr(facts.jax, name)]
    if not found:
        return None
    return Advice(
        "warning",
        f"JAX's settings for debugging are on: {', '.join(found)}.",
        "Each result is waited for and looked at, or nothing is compiled: slow, and buffers are "
        "not donated, so memory rises too.",
        "Unset JAX_DEBUG_NANS, JAX_DEBUG_INFS and JAX_DISABLE_JIT; training stops at a number "
        "that is not finite by itself.",
    )


HOST_HAZARDS = (
    container_limit,
    no_swap,
    blas_threads,
    few_processors,
    disk_in_memory,
    little_disk,
    wide_types,
    debug_flags,
)
