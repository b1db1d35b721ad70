"""What is known of a machine, as plain values, so that advice can be tested without it."""

import dataclasses

from emloc_jax.memory._doctor_rates import Rates

__all__ = ["DeviceFacts", "HostFacts", "JaxFacts", "MachineFacts", "PlaceFacts"]


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """One device.

    Attributes:
      name: as JAX prints it.
      platform: cpu, gpu or tpu.
      kind: model of the chip.
      memories: kinds of memory that it can address, the default one first.
      limit: bytes that JAX's allocator may use; None: not told.
      in_use: bytes in use; None: not told.
    """

    name: str
    platform: str
    kind: str
    memories: tuple[str, ...]
    limit: int | None = None
    in_use: int | None = None


@dataclasses.dataclass(frozen=True)
class HostFacts:
    """The machine around the devices.

    Attributes:
      total: bytes of main memory.
      free: bytes that can be had without swapping, within a container's limit.
      container_limit: bytes that a container may use; None: no limit.
      swap: bytes of swap space; None: not told.
      cpus: processors of the machine.
      usable_cpus: those that this process may run on.
      blas_threads: most threads of a linear algebra library in use; None: none was found.
    """

    total: int
    free: int
    container_limit: int | None = None
    swap: int | None = None
    cpus: int = 1
    usable_cpus: int = 1
    blas_threads: int | None = None


@dataclasses.dataclass(frozen=True)
class PlaceFacts:
    """Where runs are to be written.

    Attributes:
      folder: its path.
      file_system: its kind; None: not told.
      total: bytes of the disk.
      free: bytes that are free.
    """

    folder: str
    file_system: str | None
    total: int
    free: int


@dataclasses.dataclass(frozen=True)
class JaxFacts:
    """How JAX is set.

    Attributes:
      backend: default platform.
      x64: whether 64-bit types are on.
      debug_nans: whether every result is searched for NaN, or infinities.
      disable_jit: whether nothing is compiled.
      matmul_precision: default of matrix products; None: the backend's own.
      plugins: installed packages that bring an accelerator's backend.
    """

    backend: str
    x64: bool = False
    debug_nans: bool = False
    disable_jit: bool = False
    matmul_precision: str | None = None
    plugins: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MachineFacts:
    """All of it.

    Attributes:
      versions: package to version; None: not installed.
      jax: how it is set.
      devices: local ones of the default backend.
      host: the machine around them.
      place: where runs are to be written.
      environment: variables that steer JAX's memory, of those that are set.
      accelerators: signs of accelerators that the operating system shows.
      rates: measured speeds; None: not measured.
    """

    versions: dict[str, str | None]
    jax: JaxFacts
    devices: tuple[DeviceFacts, ...]
    host: HostFacts
    place: PlaceFacts
    environment: dict[str, str]
    accelerators: tuple[str, ...] = ()
    rates: Rates | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether JAX computes on GPUs."""
        return self.jax.backend not in ("cpu", "tpu")
