"""Hazards of GPUs: pools, fractions, page-locked memory."""

from emloc_jax._bytes import format_bytes
from emloc_jax.memory._doctor_facts import MachineFacts
from emloc_jax.memory._doctor_hazard import Advice

__all__ = [
    "GPU_HAZARDS",
    "memory_fraction",
    "pinned_pool",
    "platform_allocator",
    "preallocation",
]

_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_POOL_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_POOL_DEFAULT = 64  # GB, of XLA


def _allocator(facts: MachineFacts) -> str:
    return facts.environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()


def preallocation(facts: MachineFacts) -> Advice | None:
    """XLA's pool takes its share of the GPU when the first operation runs."""
    chosen = facts.environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    off = chosen in ("false", "False", "0") or _allocator(facts) == "platform"
    if not facts.on_gpu or off:
        return None
    return Advice(
        "note",
        "JAX takes its pool on the GPU at once (preallocation).",
        "nvidia-smi shows the pool, not what is in use, and another process finds only the rest.",
        "Read what is in use from the ledger. To share the GPU, set "
        "XLA_PYTHON_CLIENT_PREALLOCATE=false; the pool then grows, and may fragment.",
    )


def memory_fraction(facts: MachineFacts) -> Advice | None:
    """By default the pool starts with three quarters of the GPU."""
    told = any(facts.environment.get(name) for name in _FRACTIONS)
    if not facts.on_gpu or told or _allocator(facts) == "platform":
        return None
    limits = [device.limit for device in facts.devices if device.limit is not None]
    size = f" ({format_bytes(min(limits))})" if limits else ""
    return Advice(
        "warning",
        f"JAX's pool is limited to its default share of the GPU, 75 %{size}.",
        "A step that needs more fails although the card has room.",
        "Set XLA_CLIENT_MEM_FRACTION=0.95 when nothing else needs the GPU; set it lower to hold a "
        "run to a budget.",
    )


def platform_allocator(facts: MachineFacts) -> Advice | None:
    """Each array is then allocated by the driver."""
    if not facts.on_gpu or _allocator(facts) != "platform":
        return None
    return Advice(
        "warning",
        "XLA_PYTHON_CLIENT_ALLOCATOR=platform: every buffer is asked of the driver.",
        "That is slow, and such an allocator may keep no statistics for the ledger.",
        "Unset it, unless you look for the least memory that a program can run in.",
    )


def pinned_pool(facts: MachineFacts) -> Advice | None:
    """XLA limits the pool of page-locked host memory, whatever the machine has."""
    if not facts.on_gpu or not any("pinned_host" in d.memories for d in facts.devices):
        return None
    said = facts.environment.get(_POOL_LIMIT)
    try:
        limit = _POOL_DEFAULT if said is None else int(said)
    except ValueError:
        return Advice(
            "warning",
            f"{_POOL_LIMIT}={said} is not a whole number.",
            "XLA reads it when page-locked memory is first asked for.",
            f"Give gigabytes, e.g. {_POOL_LIMIT}={_POOL_DEFAULT}, or unset it.",
        )
    host = facts.host.total
    if facts.host.container_limit is not None:
        host = min(host, facts.host.container_limit)
    room = max(1, host * 3 // 4 // 10**9)
    if limit * 10**9 > host:
        return Advice(
            "warning",
            f"The pool of page-locked host memory may grow to {limit} GB; the host has "
            f"{format_bytes(host)}.",
            "Page-locked memory is never given back to the system, so the run is killed, not "
            "refused, when it is too much.",
            f"Set {_POOL_LIMIT}={room}, three quarters of the host.",
        )
    if said is None and limit < room:
        return Advice(
            "note",
            f"The pool of page-locked host memory ends at {limit} GB by default; the host has "
            f"{format_bytes(host)}.",
            "Weights, activations or moments kept in pinned_host beyond it fail to allocate.",
            f"Set {_POOL_LIMIT}={room}, three quarters of the host, if a plan needs more.",
        )
    return None


GPU_HAZARDS = (memory_fraction, platform_allocator, pinned_pool, preallocation)
