"""The link between a device and its host: one small interface, three ways to cross it."""

import time
from typing import Any, Protocol

import jax
import numpy as np

from emloc_jax.errors import ConfigError

__all__ = ["DevicePutLink", "Link", "PinnedHostLink", "SimulatedLink", "tree_bytes"]


class Link(Protocol):
    """Moves pytrees of arrays; each call returns when the data has arrived.

    Both calls block, since they run on lanes of their own: a lane that is waiting for a copy is
    what the timeline shows as busy. Calls of the two directions come from different threads.
    """

    def to_host(self, tree: Any) -> Any:
        """Device arrays to NumPy arrays or arrays of the CPU backend."""
        ...

    def to_device(self, tree: Any) -> Any:
        """Arrays of the host to device arrays."""
        ...


class DevicePutLink:
    """Plain copies: `jax.device_get` and `jax.device_put`. Works on every backend.

    Args:
      device: the device; by default the first of the default backend.

    Example:
      >>> import jax.numpy as jnp
      >>> link = DevicePutLink()
      >>> link.to_device(link.to_host({"a": jnp.ones(2)}))["a"].sum()
      Array(2., dtype=float32)
    """

    def __init__(self, device: Any = None):
        self.device = jax.local_devices()[0] if device is None else device

    def to_host(self, tree: Any) -> Any:
        """NumPy arrays; on the CPU backend they are views, which nobody may write to."""
        return jax.device_get(tree)  # starts all copies before it waits for the first

    def to_device(self, tree: Any) -> Any:
        """Arrays on the device."""
        return jax.block_until_ready(jax.device_put(tree, self.device))


class PinnedHostLink:
    """Copies through page-locked host memory (memory kind `pinned_host`), at the link's speed.

    Args:
      device: the device; by default the first of the default backend.

    Raises:
      ConfigError: the device has no memory of kind `pinned_host`.
    """

    def __init__(self, device: Any = None):
        self.device = jax.local_devices()[0] if device is None else device
        kinds = {memory.kind for memory in self.device.addressable_memories()}
        if "pinned_host" not in kinds:
            raise ConfigError(
                f"{self.device} has no 'pinned_host' memory (it has {', '.join(sorted(kinds))}). "
                "Use DevicePutLink."
            )
        self._device = jax.sharding.SingleDeviceSharding(self.device, memory_kind="device")
        self._host = self._device.with_memory_kind("pinned_host")

    def to_host(self, tree: Any) -> Any:
        """NumPy views of arrays in pinned memory."""
        return jax.tree.map(np.asarray, jax.block_until_ready(jax.device_put(tree, self._host)))

    def to_device(self, tree: Any) -> Any:
        """Arrays in device memory, staged through pinned memory."""
        # By way of NumPy, a view of what the CPU backend holds: no copy between two backends.
        pinned = jax.device_put(jax.tree.map(np.asarray, tree), self._host)
        return jax.block_until_ready(jax.device_put(pinned, self._device))


class SimulatedLink:
    """Another link, slowed down to a stated bandwidth, to compare schedules on any machine.

    A copy of n bytes takes `latency + n / bytes_per_second` seconds in its direction, spent
    sleeping, so that compute goes on beside it as it would beside a copy engine.

    Args:
      bytes_per_second: bandwidth of each direction.
      latency: seconds per call.
      link: what really moves the data; by default a `DevicePutLink`.

    Raises:
      ConfigError: a bandwidth that is not positive or a negative latency.
    """

    def __init__(self, bytes_per_second: float, *, latency: float = 0.0, link: Link | None = None):
        if not bytes_per_second > 0 or latency < 0:
            raise ConfigError(
                f"A link of {bytes_per_second} bytes/s with a latency of {latency} s was asked "
                "for; the first must be positive and the second not negative."
            )
        self.bytes_per_second, self.latency = bytes_per_second, latency
        self._link = DevicePutLink() if link is None else link

    def to_host(self, tree: Any) -> Any:
        """As the inner link, after the time the copy takes."""
        return self._slowed(self._link.to_host, tree)

    def to_device(self, tree: Any) -> Any:
        """As the inner link, after the time the copy takes."""
        return self._slowed(self._link.to_device, tree)

    def _slowed(self, move: Any, tree: Any) -> Any:
        ends = time.perf_counter() + self.latency + tree_bytes(tree) / self.bytes_per_second
        moved = move(tree)
        time.sleep(max(0.0, ends - time.perf_counter()))
        return moved


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree.

    Example:
      >>> tree_bytes({"a": np.ones((2, 3), np.float32)})
      24
    """
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
