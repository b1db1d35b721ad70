"""Speeds of the link, of matrix products and of Adam on the host."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.memory._doctor_rates import LinkRates, ProductRate, Rates
from emloc_jax.memory._probes_disk import disk_rates
from emloc_jax.offload import (
    AdamOptions,
    DevicePutLink,
    Link,
    PinnedHostLink,
    host_update,
    init_moments,
    measure_link,
    shortest_time,
)

__all__ = ["available_links", "fp32_error", "link_rates", "measure_rates", "product_rates"]

_PRODUCTS = (("float32", None), ("float32", "highest"), ("bfloat16", None))


def measure_rates(
    folder: Path,
    *,
    width: int | None = None,
    copy_bytes: int = 1 << 26,
    disk_bytes: int = 1 << 26,
    elements: int = 1 << 22,
    repeats: int = 3,
) -> Rates:
    """Measures everything, one thing at a time; seconds on a small machine.

    Args:
      folder: where the disk is measured.
      width: of the square matrices; None: 1024 on a CPU, 8192 elsewhere.
      copy_bytes: of the largest copy between device and host.
      disk_bytes: of the file.
      elements: that Adam updates.
      repeats: each time is the shortest of as many.
    """
    if width is None:
        width = 1024 if jax.default_backend() == "cpu" else 8192
    disk = disk_rates(folder, disk_bytes)
    return Rates(
        links=tuple(link_rates(link, copy_bytes, repeats) for link in available_links()),
        products=product_rates(width, repeats),
        fp32_error=fp32_error(),
        host_adam=_host_adam(elements, repeats),
        disk_write=None if disk is None else disk[0],
        disk_read=None if disk is None else disk[1],
    )


def available_links() -> Sequence[Link]:
    """Every implementation that the first device has."""
    device = jax.local_devices()[0]
    pinned = any(memory.kind == "pinned_host" for memory in device.addressable_memories())
    return [DevicePutLink(), PinnedHostLink()] if pinned else [DevicePutLink()]


def link_rates(link: Link, nbytes: int, repeats: int = 3) -> LinkRates:
    """Both directions; the one to the host is None if the host looks at the device's own bytes."""
    rates = measure_link(link, nbytes=nbytes, repeats=repeats)
    probe = jax.block_until_ready(jnp.zeros(1 << 10, jnp.float32))
    copied = not _shared(probe, link.to_host(probe))
    return LinkRates(
        type(link).__name__, rates.to_host if copied else None, rates.to_device, rates.latency
    )


def _shared(on_device: jax.Array, on_host: np.ndarray) -> bool:
    """Whether both are the same bytes, as only a device that is the CPU can have it."""
    if {device.platform for device in on_device.devices()} != {"cpu"}:
        return False
    return on_device.unsafe_buffer_pointer() == on_host.ctypes.data


def product_rates(width: int, repeats: int = 3) -> tuple[ProductRate, ...]:
    """FLOP/s of `(width, width)` products: fp32 by default and in full, and bf16."""
    found = []
    for dtype, precision in _PRODUCTS:
        matrix = jnp.full((width, width), 1 / width, dtype)
        multiply = jax.jit(lambda a, p=precision: jnp.matmul(a, a, precision=p))
        seconds = shortest_time(
            lambda a=matrix: a, lambda a, m=multiply: jax.block_until_ready(m(a)), repeats
        )
        found.append(ProductRate(dtype, precision, width, 2 * width**3 / seconds))
    return tuple(found)


def fp32_error(width: int = 256) -> float:
    """Relative error of a default product of fp32 matrices, against NumPy in float64.

    About 1e-7 in full fp32, 1e-4 to 1e-3 in TF32 or bf16.
    """
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, width, width)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    found = np.asarray(jax.jit(jnp.matmul)(a, b), np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _host_adam(elements: int, repeats: int) -> float:
    """Elements per second of the update that LSP-Offload runs on the host."""
    update = host_update(AdamOptions(), jnp.float32)
    gradients = {"kernel": np.random.default_rng(0).standard_normal(elements).astype(np.float32)}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        moments = {"kernel": init_moments((elements,))}

    def run(gradients: Any) -> None:
        nonlocal moments
        _, moments = update(gradients, moments, 1e-3, 1.0)

    return elements / shortest_time(lambda: gradients, run, repeats)
