"""Everything that the doctor looks at."""

import os
from pathlib import Path
from typing import Any

import jax

from emloc_jax.memory._doctor_facts import DeviceFacts, JaxFacts, MachineFacts
from emloc_jax.memory._ledger_device import allocator_statistics
from emloc_jax.memory._probes_host import (
    accelerator_signs,
    host_facts,
    installed_versions,
    jax_plugins,
    place_facts,
)
from emloc_jax.memory._probes_rates import measure_rates

__all__ = ["ENVIRONMENT", "examine"]

ENVIRONMENT = (
    "JAX_PLATFORMS",
    "JAX_PLATFORM_NAME",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_COMPILATION_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",
    "TF_GPU_ALLOCATOR",
    "XLA_FLAGS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)
"""Variables that steer where JAX computes, its memory, and threads."""


def examine(folder: str | os.PathLike = ".", *, measure: bool = True) -> MachineFacts:
    """Looks at this machine; starts JAX's backend.

    Args:
      folder: where runs are to be written.
      measure: also measure speeds, which takes seconds.

    Raises:
      OSError: there is no such folder.

    Example:
      >>> facts = examine(measure=False)
      >>> len(facts.devices) > 0 and facts.rates is None
      True
    """
    place = place_facts(Path(folder))
    return MachineFacts(
        versions=installed_versions(),
        jax=_jax_facts(),
        devices=tuple(_device_facts(device) for device in jax.local_devices()),
        host=host_facts(),
        place=place,
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        accelerators=accelerator_signs(),
        rates=measure_rates(Path(folder)) if measure else None,
    )


def _device_facts(device: Any) -> DeviceFacts:
    statistics = allocator_statistics(device)
    default = device.default_memory().kind
    kinds = [memory.kind for memory in device.addressable_memories()]
    return DeviceFacts(
        name=str(device),
        platform=device.platform,
        kind=device.device_kind,
        memories=(default, *(kind for kind in kinds if kind != default)),
        limit=statistics.get("bytes_limit"),
        in_use=statistics.get("bytes_in_use"),
    )


def _jax_facts() -> JaxFacts:
    config: Any = jax.config  # its attributes are made at run time
    return JaxFacts(
        backend=jax.default_backend(),
        x64=bool(config.jax_enable_x64),
        debug_nans=bool(config.jax_debug_nans or config.jax_debug_infs),
        disable_jit=bool(config.jax_disable_jit),
        matmul_precision=config.jax_default_matmul_precision,
        plugins=jax_plugins(),
    )
