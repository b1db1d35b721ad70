"""Hazards of any backend: an accelerator left aside, missing statistics, short digits, links."""

from emloc_jax.memory._doctor_facts import MachineFacts
from emloc_jax.memory._doctor_hazard import Advice

__all__ = [
    "DEVICE_HAZARDS",
    "fast_math_products",
    "host_devices",
    "no_statistics",
    "one_of_many",
    "slow_bfloat16",
    "slow_link",
    "unused_accelerator",
]

_FULL_PRECISIONS = ("highest", "float32", "F32_F32_F32")
_FP32_ERROR = 1e-5  # a product in full fp32 is an order of magnitude below, TF32 one above


def unused_accelerator(facts: MachineFacts) -> Advice | None:
    """The system shows an accelerator, and JAX computes on the CPU."""
    if facts.jax.backend != "cpu" or not facts.accelerators:
        return None
    what = f"This machine has an accelerator ({', '.join(facts.accelerators)}), and JAX uses the "
    platforms = facts.environment.get("JAX_PLATFORMS", facts.environment.get("JAX_PLATFORM_NAME"))
    if platforms:
        return Advice(
            "warning",
            f"{what}CPU because JAX_PLATFORMS={platforms}.",
            "Everything is many times slower than it could be.",
            "Unset JAX_PLATFORMS (and JAX_PLATFORM_NAME).",
        )
    if not facts.jax.plugins:
        return Advice(
            "warning",
            f"{what}CPU because no backend for it is installed.",
            "Everything is many times slower than it could be.",
            "pip install 'jax[cuda13]' (NVIDIA; 'jax[cuda12]' for older drivers), or what "
            "https://docs.jax.dev/en/latest/installation.html names for yours.",
        )
    return Advice(
        "warning",
        f"{what}CPU although {', '.join(facts.jax.plugins)} is installed.",
        "The backend did not start: a driver that is too old or missing, or a GPU that is hidden.",
        "Run JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' to see its error; look at "
        "nvidia-smi and CUDA_VISIBLE_DEVICES.",
    )


def no_statistics(facts: MachineFacts) -> Advice | None:
    """The backend's allocator keeps no statistics, as the CPU's."""
    if any(device.limit is not None for device in facts.devices):
        return None
    return Advice(
        "note",
        f"The {facts.jax.backend} backend keeps no memory statistics.",
        "The ledger has no measured device peak, and no limit of the device is known.",
        "Go by the compiled analysis (`emloc plan`) and by the resident set in the ledger.",
    )


def fast_math_products(facts: MachineFacts) -> Advice | None:
    """Products of fp32 matrices may be computed with fewer digits: TF32 on GPUs, bf16 on TPUs."""
    chosen = facts.jax.matmul_precision
    if facts.rates is not None:
        if facts.rates.fp32_error < _FP32_ERROR:
            return None
        digits = f"a product is off by {facts.rates.fp32_error:.1e}"
        fast = facts.rates.product("float32")
        full = facts.rates.product("float32", "highest")
        price = f" (here {fast / full:.1f} x slower)" if fast and full else ""
    elif facts.jax.backend == "cpu" or chosen in _FULL_PRECISIONS:
        return None
    else:
        digits, price = "not measured", ""
    default = "by default" if chosen is None else f"jax_default_matmul_precision={chosen}"
    return Advice(
        "warning",
        f"Products of fp32 matrices do not have fp32's digits ({default}; {digits}).",
        "Good enough for training; factorization, correction and comparisons with other "
        "frameworks lose digits: TF32 has 10 bits of mantissa, fp32 has 23.",
        f"JAX_DEFAULT_MATMUL_PRECISION=highest gives them back{price}.",
    )


def host_devices(facts: MachineFacts) -> Advice | None:
    """Several devices that are one CPU."""
    flag = "xla_force_host_platform_device_count"
    if flag not in facts.environment.get("XLA_FLAGS", "") or facts.jax.backend != "cpu":
        return None
    return Advice(
        "note",
        f"XLA_FLAGS splits the CPU into {len(facts.devices)} devices.",
        "They share cores and memory; it serves tests of sharding.",
        f"Leave --{flag} out for real runs.",
    )


def one_of_many(facts: MachineFacts) -> Advice | None:
    """More devices than are used."""
    if facts.jax.backend == "cpu" or len(facts.devices) < 2:
        return None
    return Advice(
        "note",
        f"There are {len(facts.devices)} devices.",
        f"The commands use the first one, {facts.devices[0].name}.",
        "CUDA_VISIBLE_DEVICES (TPU_VISIBLE_CHIPS) picks another, and leaves the rest alone.",
    )


def slow_link(facts: MachineFacts) -> Advice | None:
    """Plain copies are much slower than those through page-locked memory."""
    if facts.rates is None or facts.jax.backend == "cpu":
        return None
    plain, pinned = facts.rates.link("DevicePutLink"), facts.rates.link("PinnedHostLink")
    if plain is None or pinned is None:
        return None
    pairs = ((pinned.to_host, plain.to_host), (pinned.to_device, plain.to_device))
    gains = [fast / slow for fast, slow in pairs if fast and slow]
    if not gains or max(gains) < 1.5:
        return None
    return Advice(
        "note",
        f"Copies through page-locked memory are up to {max(gains):.1f} x faster here.",
        "LSP-Offload moves gradients and updates at every step.",
        "Use lsp.link=pinned.",
    )


def slow_bfloat16(facts: MachineFacts) -> Advice | None:
    """A device, mostly an old CPU, that multiplies in bf16 slower than in fp32."""
    if facts.rates is None:
        return None
    single, half = facts.rates.product("float32"), facts.rates.product("bfloat16")
    if single is None or half is None or half >= 0.8 * single:
        return None
    return Advice(
        "note",
        f"Products in bf16 are {single / half:.1f} x slower than in fp32 on this device.",
        "Halved activations would be paid for with time.",
        "Keep model.compute_dtype=float32, unless memory is what is short.",
    )


DEVICE_HAZARDS = (
    unused_accelerator,
    fast_math_products,
    no_statistics,
    host_devices,
    one_of_many,
    slow_link,
    slow_bfloat16,
)
