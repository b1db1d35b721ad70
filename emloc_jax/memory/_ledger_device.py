"""What JAX tells of the memory in use on its devices, and of page-locked host memory."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from emloc_jax.memory._ledger_peak import Reading

__all__ = ["allocator_statistics", "device_readings", "pinned_bytes"]


def device_readings() -> tuple[Reading, ...]:
    """The allocator's counters of each local device of the default backend.

    Backends without statistics (the CPU's) give empty readings.
    """
    return tuple(_reading(device) for device in jax.local_devices())


def _reading(device: Any) -> Reading:
    stats = allocator_statistics(device)
    return Reading(stats.get("bytes_in_use"), stats.get("peak_bytes_in_use"))


def allocator_statistics(device: Any) -> Mapping[str, int]:
    """What the device's allocator tells; empty if nothing."""
    try:
        return device.memory_stats() or {}
    except Exception:  # a backend may refuse with an error of its own; a run must go on
        return {}


def pinned_bytes() -> int | None:
    """Bytes of the live JAX arrays in memory of kind `pinned_host`; None: not told.

    What XLA holds back in its pool, or uses inside a program, is not told by any backend.

    Example:
      >>> here = pinned_bytes()
      >>> kind = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
      >>> x = jax.device_put(jax.numpy.ones(256), kind)
      >>> pinned_bytes() - here
      1024
    """
    try:
        return sum(_local_bytes(array) for array in jax.live_arrays() if _is_pinned(array))
    except Exception:  # an array may be deleted by another thread while it is asked
        return None


def _is_pinned(array: jax.Array) -> bool:
    return not array.is_deleted() and array.sharding.memory_kind == "pinned_host"


def _local_bytes(array: jax.Array) -> int:
    shard = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return shard * len(array.sharding.addressable_devices)
