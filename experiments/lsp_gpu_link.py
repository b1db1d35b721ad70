"""Bandwidth of every way over the link, and of the products beside it, for `lsp_gpu.py`."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.errors import ConfigError
from emloc_jax.offload import DevicePutLink, PinnedHostLink

TRIPS = 8  # products per dispatch


def bandwidth(task, write):
    """Every way alone; then the links both ways at once, and beside a running product."""
    cpu = jax.local_devices(backend="cpu")[0]
    plain = DevicePutLink()
    links = {"device_put": plain}
    try:
        links["pinned"] = PinnedHostLink()
    except ConfigError as error:
        write(link="pinned", outcome="refused", message=str(error))
    down = {f"{name} link": link.to_host for name, link in links.items()}
    down["np.asarray"] = np.asarray
    down["cpu backend"] = lambda x: jax.block_until_ready(jax.device_put(x, cpu))
    up = {f"{name} link": link.to_device for name, link in links.items()}
    on_device = jax.sharding.SingleDeviceSharding(plain.device, memory_kind="device")
    pinned = on_device.with_memory_kind("pinned_host") if "pinned" in links else None
    product = Product(task["width"])
    alone = product.rate_during(lambda: time.sleep(task["product_seconds"]))
    write(condition="product alone", tflops=alone / 1e12)
    for size in task["sizes"]:
        count = max(3, task["bytes"] // size)
        for name, move in down.items():
            seconds = timed([downloads(move, size, count)])[0]
            write(**row(name, "to host", "alone", size, count, seconds))
        for name, move in up.items():
            for source in ("", ", from cpu backend"):  # or NumPy
                on = cpu if source else None
                seconds = timed([uploads(move, size, count, on)])[0]
                write(**row(name + source, "to device", "alone", size, count, seconds))
        if pinned is not None:  # without the copy into pinned memory that a link makes first
            move = functools.partial(jax.device_put, device=on_device)
            seconds = timed([uploads(move, size, count, pinned)])[0]
            write(**row("from pinned memory", "to device", "alone", size, count, seconds))
        for name in links:
            key = f"{name} link"
            beside(write, product, alone, key, down[key], up[key], size, count)


def beside(write, product, alone, name, down, up, size, count):
    """A link's two directions at once, and each and both while products run."""
    ways = ("to host", "to device")

    def prepared(chosen):
        make = {"to host": lambda: downloads(down, size, count)}
        make["to device"] = lambda: uploads(up, size, count)
        return [make[way]() for way in chosen]

    for way, seconds in zip(ways, timed(prepared(ways)), strict=True):
        write(**row(name, way, "both ways", size, count, seconds))
    for chosen, label in (
        (ways[:1], "beside a product"),
        (ways[1:], "beside a product"),
        (ways, "both ways, beside a product"),
    ):
        moves, took = prepared(chosen), []
        rate = product.rate_during(lambda moves=moves, took=took: took.extend(timed(moves)))
        for way, seconds in zip(chosen, took, strict=True):
            slower = {"tflops": rate / 1e12, "product_speed": rate / alone}
            write(**row(name, way, label, size, count, seconds), **slower)


def row(name, way, condition, size, count, seconds):
    return {
        "way": name,
        "direction": way,
        "condition": condition,
        "mebibytes": size / 2**20,
        "copies": count,
        "gigabytes_per_second": size * count / seconds / 1e9,
    }


def downloads(move, size, count):
    """Copies of arrays that were never copied before: JAX keeps what came to the host."""
    fill = jax.jit(lambda value: jnp.full((size // 4,), value, jnp.float32))
    arrays = [fill(np.float32(number)) for number in range(count + 1)]
    jax.block_until_ready(arrays)
    check(np.asarray(move(arrays.pop())), count)

    def run():
        for array in arrays:
            move(array)

    return run


def uploads(move, size, count, on=None):
    """Copies of NumPy arrays, or of arrays elsewhere: Adam on the host returns JAX's CPU arrays."""
    sources = [np.full(size // 4, number, np.float32) for number in range(4)]
    if on is not None:
        sources = [jax.device_put(source, on, may_alias=False) for source in sources]
    check(np.asarray(move(sources[3])), 3)

    def run():
        for number in range(count):
            jax.block_until_ready(move(sources[number % 4]))

    return run


def check(array, value):
    if not (array == value).all():
        raise AssertionError(f"A copy arrived with {array.ravel()[:3]} in place of {value}.")


def timed(runs):
    """Seconds of each of some functions that start together."""
    barrier, seconds = threading.Barrier(len(runs)), [0.0] * len(runs)

    def work(number):
        barrier.wait()
        began = time.perf_counter()
        runs[number]()
        seconds[number] = time.perf_counter() - began

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(seconds):
        raise RuntimeError("A copy failed; its error is above.")
    return seconds


class Product:
    """A matrix product that is repeated for as long as something else goes on."""

    def __init__(self, width):
        key = jax.random.key(0)
        self.a = jax.random.normal(key, (width, width), jnp.bfloat16) / width**0.5
        self.run = jax.jit(
            lambda a, b: jax.lax.fori_loop(0, TRIPS, lambda _, b: (a @ b).astype(b.dtype), b)
        )
        self.flops = TRIPS * 2.0 * width**3
        self.run(self.a, self.a).block_until_ready()

    def rate_during(self, act):
        """FLOP/s of the products that ended while `act()` ran."""
        ends, stop = [], threading.Event()

        def work():
            before = now = self.run(self.a, self.a)
            while not stop.is_set():
                before, now = now, self.run(self.a, now)  # two dispatched, so that none waits
                before.block_until_ready()
                ends.append(time.perf_counter())

        thread = threading.Thread(target=work)
        thread.start()
        while len(ends) < 2:
            if not thread.is_alive():
                raise RuntimeError("The product failed; its error is above.")
            time.sleep(0.001)
        began = time.perf_counter()
        act()
        ended = time.perf_counter()
        stop.set()
        thread.join()
        done = sum(began <= end <= ended for end in ends)
        return self.flops * max(done, 1) / (ended - began)
