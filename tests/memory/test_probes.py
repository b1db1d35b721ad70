"""Probes against what is known of the machine by other ways."""

import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.memory import _probes, _probes_host, _probes_rates, advise, examine
from emloc_jax.memory._probes_disk import disk_rates
from emloc_jax.offload import SimulatedLink
from tests.memory.machines import machine, rates

SMALL = {"width": 32, "copy_bytes": 1 << 16, "disk_bytes": 1 << 16, "elements": 64, "repeats": 1}


def tf32(a):
    """Rounded to a mantissa of 10 bits, as tensor cores read fp32."""
    bits = np.asarray(a).view(np.uint32) + np.uint32(1 << 12)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def test_products_in_full_and_in_tf32_are_told_apart(monkeypatch):
    full = _probes_rates.fp32_error()
    product = jnp.matmul

    def short(a, b):
        a, b = (jax.pure_callback(tf32, x, x) for x in (a, b))
        return product(a, b)

    monkeypatch.setattr(_probes_rates.jnp, "matmul", short)
    fast = _probes_rates.fp32_error()
    # Rounding to 10 bits: up to 2**-11 for each factor, uniform, so 4e-4 at most.
    assert full < 1e-6 < 1e-4 < fast < 4e-4
    assert advise(machine(rates=rates(fp32_error=full))) == []
    assert "TF32" in advise(machine(rates=rates(fp32_error=fast)))[0].why


def test_a_link_of_known_speed(monkeypatch):
    clock = [0.0]  # of its own, so that other work on the machine takes no time

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    found = _probes_rates.link_rates(SimulatedLink(2e7, latency=0.01), 1 << 20, repeats=2)
    np.testing.assert_allclose(found.to_device, 2e7, rtol=1e-6)
    assert found.to_host is None  # below the simulated link there is a view of the CPU's memory


def test_small_measurements_are_complete(tmp_path):
    found = _probes_rates.measure_rates(tmp_path, **SMALL)
    names = [type(link).__name__ for link in _probes_rates.available_links()]
    assert [link.link for link in found.links] == names
    assert {(p.dtype, p.precision) for p in found.products} == {
        ("float32", None), ("float32", "highest"), ("bfloat16", None)
    }  # fmt: skip
    speeds = [p.flops for p in found.products] + [link.to_device for link in found.links]
    speeds += [found.host_adam, found.disk_write, found.disk_read]
    assert all(speed > 0 for speed in speeds)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written(tmp_path):
    assert disk_rates(tmp_path / "nowhere", 1 << 12) is None


def test_facts_agree_with_the_system(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("HF_TOKEN", "secret")
    facts = examine(tmp_path, measure=False)
    assert facts.versions["jax"] == jax.__version__
    assert facts.jax.backend == "cpu" and len(facts.devices) == len(jax.local_devices())
    assert facts.devices[0].memories[0] == jax.devices()[0].default_memory().kind
    assert facts.host.usable_cpus == len(os.sched_getaffinity(0))
    assert facts.place.total == shutil.disk_usage(tmp_path).total
    assert facts.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "secret" not in repr(facts)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        inside = _probes._jax_facts()
    assert (inside.x64, inside.matmul_precision) == (True, "highest")


def test_the_nearest_mount_names_the_file_system(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"disk / ext4 rw 0 0\nnone {tmp_path} tmpfs rw 0 0\nnone {tmp_path}/a\\040b xfs rw 0 0\n"
    )
    monkeypatch.setattr(_probes_host, "_MOUNTS", mounts)
    for name in ("a b", "a bc"):
        (tmp_path / name).mkdir()
    kinds = [_probes_host.place_facts(tmp_path / n).file_system for n in ("a b", "a bc", "..")]
    assert kinds == ["xfs", "tmpfs", "ext4"]


@pytest.mark.parametrize(
    ("file", "seen"), [("dev/nvidia0", 1), ("dev/nvidiactl", 0), ("dev/accel3", 1), ("dev/kfd", 1)]
)
def test_device_files_tell_of_accelerators(tmp_path, monkeypatch, file, seen):
    (tmp_path / "dev").mkdir()
    (tmp_path / file).touch()
    monkeypatch.setattr(_probes_host, "_ROOT", tmp_path)
    assert len(_probes_host.accelerator_signs()) == seen
