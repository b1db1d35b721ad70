"""Made machines: a plain one with nothing to say about, and changes to it."""

import dataclasses

from emloc_jax.memory import (
    DeviceFacts,
    HostFacts,
    JaxFacts,
    LinkRates,
    MachineFacts,
    PlaceFacts,
    ProductRate,
    Rates,
)

GB, GIB = 10**9, 2**30
KINDS = ("device", "pinned_host")
H100 = DeviceFacts("cuda:0", "gpu", "NVIDIA H100 80GB HBM3", KINDS, limit=76 * GIB, in_use=0)
FULL = (("float32", None, 5e13), ("float32", "highest", 5e13), ("bfloat16", None, 7e14))


def rates(*, products=FULL, fp32_error=3e-7, plain=5e10, pinned=5e10):
    return Rates(
        links=(
            LinkRates("DevicePutLink", plain, plain, 1e-5),
            LinkRates("PinnedHostLink", pinned, pinned, 1e-5),
        ),
        products=tuple(ProductRate(d, p, 8192, f) for d, p, f in products),
        fp32_error=fp32_error,
        host_adam=1e9,
        disk_write=1e9,
        disk_read=2e9,
    )


CALM = {
    "XLA_CLIENT_MEM_FRACTION": "0.95",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "380",
}
GPU = MachineFacts(
    versions={"jax": "0.10.2"},
    jax=JaxFacts("gpu", plugins=("jax-cuda13-plugin",)),
    devices=(H100,),
    host=HostFacts(512 * GB, 400 * GB, swap=8 * GB, cpus=32, usable_cpus=32, blas_threads=32),
    place=PlaceFacts("/data", "ext4", 1000 * GB, 500 * GB),
    environment=CALM,
    accelerators=("/dev/nvidia0",),
    rates=rates(),
)


def machine(*, environment=None, **changes):
    """`GPU` with some facts changed; keys such as `host.total` reach inside; `unset` names."""
    unset = changes.pop("unset", ())
    parts = {}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        parts.setdefault(part, {})[field] = value
    made = GPU
    for part, fields in parts.items():
        value = fields[""] if "" in fields else dataclasses.replace(getattr(made, part), **fields)
        made = dataclasses.replace(made, **{part: value})
    variables = {k: v for k, v in (CALM | (environment or {})).items() if k not in unset}
    return dataclasses.replace(made, environment=variables)


def cpu_machine(**changes):
    """The same host with JAX on the CPU and no accelerator."""
    device = DeviceFacts("cpu:0", "cpu", "cpu", ("device", "pinned_host", "unpinned_host"))
    base = {"jax": JaxFacts("cpu"), "devices": (device,), "accelerators": ()}
    return machine(**(base | changes))
