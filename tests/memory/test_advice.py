"""Each hazard on a made machine that has it, and not on one that lacks it."""

import dataclasses

import pytest

from emloc_jax.memory import JaxFacts, advise
from tests.memory.machines import GB, GPU, H100, KINDS, cpu_machine, machine, rates

FRACTION, POOL = "XLA_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
ALLOCATOR, PREALLOCATE = "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE"
TF32 = (("float32", None, 3e14), ("float32", "highest", 5e13))


def test_a_calm_machine_needs_no_advice():
    assert advise(GPU) == []


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (machine(unset=[PREALLOCATE]), "note", f"{PREALLOCATE}=false"),
        (machine(environment={PREALLOCATE: "true"}), "note", f"{PREALLOCATE}=false"),
        (machine(unset=[FRACTION]), "warning", "76.0 GiB"),
        (machine(environment={ALLOCATOR: "platform"}), "warning", "Unset"),
        (machine(unset=[POOL]), "note", "ends at 64 GB by default"),
        (machine(unset=[POOL], host__total=32 * GB), "warning", f"{POOL}=24,"),
        (machine(host__container_limit=200 * GB), "warning", f"{POOL}=150,"),
        (machine(environment={POOL: "many"}), "warning", "not a whole number"),
        (machine(rates=rates(fp32_error=3e-4, products=TF32)), "warning", "6.0 x slower"),
        (machine(rates=None), "warning", "JAX_DEFAULT_MATMUL_PRECISION=highest"),
        (machine(rates=rates(plain=2.7e9)), "note", "18.5 x faster"),
        (machine(devices=(H100, H100)), "note", "CUDA_VISIBLE_DEVICES"),
        (machine(devices=(dataclasses.replace(H100, limit=None),)), "note", "no memory statistics"),
        (machine(host__container_limit=400 * GB), "warning", "limits memory to 372.5 GiB"),
        (machine(host__swap=0), "note", "no swap"),
        (machine(host__usable_cpus=4), "warning", "OPENBLAS_NUM_THREADS=1"),
        (machine(host__usable_cpus=16), "note", "16 of 32"),
        (machine(place__file_system="tmpfs"), "warning", "main memory"),
        (machine(place__free=3 * GB), "warning", "2.8 GiB are free"),
        (machine(jax__x64=True), "warning", "jax_enable_x64"),
        (machine(jax__debug_nans=True), "warning", "JAX_DEBUG_NANS"),
        (machine(jax__disable_jit=True), "warning", "JAX_DISABLE_JIT"),
        (cpu_machine(), "note", "The cpu backend keeps no memory statistics"),
        (
            cpu_machine(rates=rates(products=(("float32", None, 1e11), ("bfloat16", None, 2e10)))),
            "note",
            "5.0 x slower than in fp32",
        ),
        (
            cpu_machine(environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}),
            "note",
            "splits the CPU",
        ),
        (
            cpu_machine(accelerators=("/dev/nvidia0",), environment={"JAX_PLATFORMS": "cpu"}),
            "warning",
            "Unset JAX_PLATFORMS",
        ),
        (cpu_machine(accelerators=("/dev/nvidia0",)), "warning", "pip install 'jax[cuda13]'"),
        (
            cpu_machine(
                accelerators=("/dev/nvidia0",),
                jax=JaxFacts("cpu", plugins=("jax-cuda13-plugin",)),
            ),
            "warning",
            "nvidia-smi",
        ),
    ],
)
def test_a_hazard_is_named_with_what_to_do(facts, level, words):
    found = [a for a in advise(facts) if words in f"{a.what} {a.why} {a.do}"]
    assert [a.level for a in found] == [level]
    assert all(text.endswith(".") for a in found for text in (a.what, a.why, a.do))


def test_warnings_come_first():
    levels = [a.level for a in advise(machine(unset=[FRACTION, PREALLOCATE, POOL]))]
    assert levels == ["warning", "note", "note"]


def test_gpu_hazards_stay_away_from_other_backends():
    variables = dict(unset=[FRACTION, PREALLOCATE, POOL])
    (only,) = advise(cpu_machine(**variables))
    assert "statistics" in only.what
    tpu = dataclasses.replace(H100, name="tpu:0", platform="tpu", memories=KINDS)
    assert advise(machine(jax=JaxFacts("tpu"), devices=(tpu,), **variables)) == []


@pytest.mark.parametrize("precision", ["highest", "float32"])
def test_full_precision_is_believed_when_nothing_was_measured(precision):
    assert advise(machine(rates=None, jax__matmul_precision=precision)) == []
