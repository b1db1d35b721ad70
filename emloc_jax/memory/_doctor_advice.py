"""From facts to advice."""

from collections.abc import Callable

from emloc_jax.memory._doctor_facts import MachineFacts
from emloc_jax.memory._doctor_hazard import Advice
from emloc_jax.memory._doctor_hazards_device import DEVICE_HAZARDS
from emloc_jax.memory._doctor_hazards_gpu import GPU_HAZARDS
from emloc_jax.memory._doctor_hazards_host import HOST_HAZARDS

__all__ = ["advise"]

_HAZARDS: tuple[Callable[[MachineFacts], Advice | None], ...] = (
    *DEVICE_HAZARDS,
    *GPU_HAZARDS,
    *HOST_HAZARDS,
)


def advise(facts: MachineFacts) -> list[Advice]:
    """What to know and do about this machine, warnings first; empty: nothing to say."""
    found = [advice for hazard in _HAZARDS if (advice := hazard(facts)) is not None]
    return sorted(found, key=lambda advice: advice.level != "warning")
