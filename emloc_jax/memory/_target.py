"""Which device programs are compiled for: the one at hand, or a card that is not here."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from emloc_jax._compiling import compiling_for
from emloc_jax.errors import ConfigError

__all__ = ["Target", "target_named"]

_GIB = 2**30
# XLA computes again what does not fit, near the limit of a card. A plan says what a program takes
# without that.
_UNLIMITED = 2**42


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      name: `here`, or the name of a card.
      platform: `cpu`, `cuda`, ...
      device: what JAX compiles for; None: its default device.
      memory: bytes of device memory that the card's data sheet says; None: not known.
    """

    name: str
    platform: str
    device: Any = None
    memory: int | None = None

    def lower(self, program: Any, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """`program.lower(*args, **kwargs)` for this device; `args` may be shapes."""
        with self.lowering():
            return program.lower(*args, **kwargs)

    @contextlib.contextmanager
    def lowering(self) -> Iterator[None]:
        """While this is open, programs are made and lowered for this device."""
        with self.compiling(), jax.default_device(self.device):
            yield

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """While this is open, programs are made with the options of this platform."""
        return compiling_for(self.platform)


@dataclasses.dataclass(frozen=True)
class _Card:
    """What XLA must know of an NVIDIA card to compile for it."""

    title: str
    capability: tuple[int, int]
    cores: int
    threads: int  # per core
    shared: int  # bytes per core
    l2: int
    bandwidth: float
    clock: float
    memory: int


_CARDS = {
    "rtx3090": _Card(
        "NVIDIA GeForce RTX 3090", (8, 6), 82, 1536, 102400, 6291456, 936e9, 1.695, 24 * _GIB
    ),
    "rtx4090": _Card(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 1536, 102400, 75497472, 1008e9, 2.52, 24 * _GIB
    ),
    "a100": _Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 2048, 167936, 41943040, 2039e9, 1.41, 80 * _GIB
    ),
    "h100": _Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 2048, 233472, 52428800, 3352e9, 1.98, 80 * _GIB
    ),
}


def target_named(name: str = "here") -> Target:
    """The device of a name.

    XLA compiles for a card that is not in the machine, if JAX's CUDA plugin is installed: its
    figures are those of the programs that would run there. (XLA tunes matrix products by trying
    them, which it cannot do then; their workspaces may differ by some megabytes.)

    Args:
      name: `here` for JAX's default device, or `rtx3090`, `rtx4090`, `a100`, `h100`.

    Raises:
      ConfigError: an unknown name, or no CUDA plugin.

    Example:
      >>> target_named().name
      'here'
    """
    if name == "here":
        return Target(name, jax.default_backend())
    if name not in _CARDS:
        raise ConfigError(
            f"target='{name}' is not known. Plan for the device at hand with 'here', or for one of "
            f"{', '.join(_CARDS)}."
        )
    return Target(name, "cuda", _device(_CARDS[name]), _CARDS[name].memory)


def _device(card: _Card) -> Any:
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            "card", "cuda", target_config=_description(card), topology="1x1x1"
        )
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"Compiling for a {card.title} that is not here needs JAX's CUDA plugin, and that did "
            f"not load ({error}). Install it (pip install jax-cuda12-plugin jax-cuda12-pjrt "
            "--no-deps, in JAX's own version) and run with JAX_PLATFORMS=cpu, or plan for 'here'."
        ) from error
    return topology.devices[0]


def _description(card: _Card) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    major, minor = card.capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {card.shared}
          shared_memory_per_block_optin: {card.shared - 1024}
          threads_per_core_limit: {card.threads}
          core_count: {card.cores} fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(card.bandwidth)}
          l2_cache_size: {card.l2}
          clock_rate_ghz: {card.clock}
          device_memory_size: {_UNLIMITED}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{card.title}" """
