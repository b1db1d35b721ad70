"""Figures of the machine at hand, for the cost model."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.kernels import lift_matrix, make_projector, project
from emloc_jax.offload._cost_model import Hardware
from emloc_jax.offload._link import Link

__all__ = ["CopyRates", "measure_hardware", "measure_link", "shortest_time"]

_logger = logging.getLogger(__name__)


class CopyRates(NamedTuple):
    """What a link does.

    Attributes:
      to_host: bytes per second down.
      to_device: bytes per second up.
      latency: seconds of a copy of nothing, of the slower direction.
    """

    to_host: float
    to_device: float
    latency: float


def measure_link(link: Link, *, nbytes: int = 1 << 26, repeats: int = 3) -> CopyRates:
    """Bandwidth of both directions, one at a time, from the times of a small and a large copy.

    Args:
      link: moves arrays; nothing else may use it meanwhile.
      nbytes: of the large copy.
      repeats: each time is the shortest of as many, after one that compiles.
    """
    to_host, down = _line(lambda n: _time_to_host(link, n, repeats), nbytes)
    to_device, up = _line(lambda n: _time_to_device(link, n, repeats), nbytes)
    return CopyRates(to_host, to_device, max(down, up))


def measure_hardware(
    link: Link,
    adam: Callable[[np.ndarray], Any],
    *,
    nbytes: int = 1 << 26,
    elements: int = 1 << 22,
    width: int = 2048,
    dtype: Any = jnp.bfloat16,
    repeats: int = 3,
    **given: Any,
) -> Hardware:
    """Measures the link, Adam on the host and the device's products, one at a time.

    Latency and bandwidth of a direction are those of the line through the times of a small and a
    large copy. Each time is the shortest of some repeats after one that compiles.

    Args:
      link: moves arrays; nothing else may use it meanwhile.
      adam: updates fp32 gradients `(elements,)`; it is waited for if it returns JAX arrays.
      nbytes: of the large copy.
      elements: of the gradient given to `adam`.
      width: of the square matrices; the projectors measured are `(width, width / 2)` with nnz 4.
      dtype: of the matrices.
      repeats: how many.
      **given: figures of `Hardware` that are known otherwise; they replace measured ones.

    Returns:
      The figures; `device_memory` from the allocator where it tells (not on CPUs), `host_memory`
      from the operating system.
    """
    copies = measure_link(link, nbytes=nbytes, repeats=repeats)
    gradient = np.random.default_rng(0).standard_normal(elements).astype(np.float32)
    update = shortest_time(lambda: None, lambda _: jax.block_until_ready(adam(gradient)), repeats)
    matrix = jnp.full((width, width), 1 / width, dtype)
    core = jnp.full((width // 2, width // 2), 1 / width, jnp.float32)
    p = make_projector(0, width, width // 2, 4)
    matmul = _time_program(lambda a: a @ a, (matrix,), repeats)
    compress = _time_program(project, (matrix, p), repeats)
    lift = _time_program(lift_matrix, (core, p, p), repeats)
    stats = jax.local_devices()[0].memory_stats() or {}
    figures = {
        **copies._asdict(),
        "host_adam": elements / update,
        "flops": 2 * width**3 / matmul,
        "compress_rate": width * width * p.nnz / compress,
        "apply_rate": width * (width // 2 + width) * p.nnz / lift,
        "device_memory": stats.get("bytes_limit"),
        "host_memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    hardware = Hardware(**(figures | given))
    _logger.info("Measured %s", hardware)
    return hardware


def _time_to_host(link: Link, nbytes: int, repeats: int) -> float:
    # JAX keeps the host's copy of an array once it was made, so each copy needs a new array.
    fill = jax.jit(lambda value: jnp.full((nbytes // 4,), value, jnp.float32))
    numbers = iter(range(repeats + 1))
    return shortest_time(
        lambda: fill(np.float32(next(numbers))).block_until_ready(), link.to_host, repeats
    )


def _time_to_device(link: Link, nbytes: int, repeats: int) -> float:
    # At an odd address: the CPU backend takes aligned arrays as they are, now and then.
    array = np.ones(nbytes // 4 + 1, np.float32)[1:]
    return shortest_time(lambda: array, lambda a: jax.block_until_ready(link.to_device(a)), repeats)


def _time_program(function: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> float:
    program = jax.jit(function)
    return shortest_time(lambda: args, lambda a: jax.block_until_ready(program(*a)), repeats)


def shortest_time(prepare: Callable[[], Any], run: Callable[[Any], Any], repeats: int) -> float:
    """Seconds of the fastest of some runs, after one that compiles; `prepare` is not timed.

    Example:
      >>> 0.01 < shortest_time(lambda: 0.01, time.sleep, 2) < 1
      True
    """
    run(prepare())
    times = []
    for _ in range(repeats):
        value = prepare()
        begin = time.perf_counter()
        run(value)
        times.append(time.perf_counter() - begin)
    return max(min(times), 1e-9)  # a clock can stand still


def _line(seconds: Callable[[int], float], nbytes: int) -> tuple[float, float]:
    """Bandwidth and latency from two copies."""
    small = max(nbytes // 64, 4)
    short, long = seconds(small), seconds(nbytes)
    if long <= short:  # copies that are views, or noise: no slope to be seen
        return nbytes / long, 0.0
    bandwidth = (nbytes - small) / (long - short)
    return bandwidth, max(0.0, short - small / bandwidth)
