"""The inputs of the blocks between the forward and the backward pass: on the device, or off it."""

from typing import Any, Literal

import jax
import numpy as np

from emloc_jax.errors import ConfigError

__all__ = ["BlockInputs", "Place", "check_place"]

Place = Literal["device", "host", "pinned_host"]


class BlockInputs:
    """Keeps what went into each block, per micro-batch, until the backward pass takes it.

    `host` holds NumPy arrays. `pinned_host` holds page-locked arrays, whose copies run beside the
    computation, but which count against the driver's limit for such memory. Copying changes no bit.

    Args:
      place: where they wait.

    Raises:
      ConfigError: the device has no such memory.

    Example:
      >>> import jax.numpy as jnp
      >>> inputs = BlockInputs("host")
      >>> inputs.keep(0, [jnp.ones((1, 4, 8))])
      >>> inputs.fetch(0)
      >>> inputs.take(0)[0].shape
      (1, 4, 8)
    """

    def __init__(self, place: Place = "device"):
        check_place(place)
        self.place: Place = place
        self._device = jax.local_devices()[0]
        self._kept: dict[int, list[Any]] = {}
        self._coming: dict[int, list[Any]] = {}

    def keep(self, block: int, values: list[Any]) -> None:
        """Takes the inputs of a block, one per micro-batch."""
        if self.place == "host":
            values = [np.asarray(value) for value in jax.device_get(values)]
        elif self.place == "pinned_host":
            pinned = jax.sharding.SingleDeviceSharding(self._device, memory_kind="pinned_host")
            values = jax.device_put(values, pinned)
        self._kept[block] = values

    def fetch(self, block: int) -> None:
        """Sends the inputs of a block on their way to the device, without waiting."""
        if block in self._kept:
            values = self._kept.pop(block)
            if self.place == "host":
                values = jax.device_put(values)
            elif self.place == "pinned_host":
                own = jax.sharding.SingleDeviceSharding(self._device)
                values = jax.device_put(values, own)
            self._coming[block] = values

    def take(self, block: int) -> list[Any]:
        """The inputs of a block on the device; they are not kept any longer."""
        self.fetch(block)
        return self._coming.pop(block)


def check_place(place: str) -> None:
    """Refuses a place that is unknown or that the device lacks.

    Raises:
      ConfigError: see above.
    """
    if place not in ("device", "host", "pinned_host"):
        raise ConfigError(
            f"Block inputs were asked to wait in '{place}'; give device, host or pinned_host."
        )
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if place == "pinned_host" and place not in kinds:
        raise ConfigError(
            f"Block inputs were asked to wait in pinned_host memory, but {device} offers only "
            f"{sorted(kinds)}. Use host."
        )
