"""The plan: every stage of some methods with its figures, beside inference of the original."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from emloc_jax._bytes import format_bytes
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._depends import relevant
from emloc_jax.memory._methods import StageMaker, stages_of
from emloc_jax.memory._setting import Setting
from emloc_jax.memory._stage import StageMemory, measure_stage
from emloc_jax.memory._target import Target, target_named

__all__ = ["Budget", "Plan", "Planner"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes allowed per memory space; None: no limit.

    Example:
      >>> Budget(device=2**30).short(device=2**31, host=0)
      {'device': 1073741824}
    """

    device: int | None = None
    host: int | None = None

    def short(self, *, device: int, host: int) -> dict[str, int]:
        """Bytes that are missing, by memory space; empty if all fits."""
        wanted = {"device": (device, self.device), "host": (host, self.host)}
        return {
            space: used - limit
            for space, (used, limit) in wanted.items()
            if limit is not None and used > limit
        }

    def excess(self, *, device: int, host: int) -> int:
        """Bytes above the limit that is exceeded most; negative if all fits, by the least margin.

        Example:
          >>> Budget(device=10).excess(device=8, host=99)
          -2
        """
        spaces = ((device, self.device), (host, self.host))
        return max((used - limit for used, limit in spaces if limit is not None), default=0)

    def __str__(self):
        given = {"device memory": self.device, "host memory": self.host}
        limits = [f"{format_bytes(size)} of {k}" for k, size in given.items() if size is not None]
        return " and ".join(limits) or "no limit"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stages take at one setting.

    Attributes:
      model: its name.
      target: name of the device that was compiled for.
      setting: the sizes and choices.
      stages: with their figures, in the order of a run.
    """

    model: str
    target: str
    setting: Setting
    stages: tuple[StageMemory, ...]

    @property
    def device(self) -> int:
        """Bytes on the device at the peak of the largest stage."""
        return max(stage.device for stage in self.stages)

    @property
    def host(self) -> int:
        """Bytes of host memory that the largest stage takes for what the plan knows of."""
        return max(sum(stage.host.values()) for stage in self.stages)

    @property
    def obstacle(self) -> StageMemory:
        """The stage with the largest peak on the device."""
        return max(self.stages, key=lambda stage: stage.device)

    def fits(self, budget: Budget) -> bool:
        """Whether no stage exceeds the budget."""
        return not budget.short(device=self.device, host=self.host)

    def of(self, method: str) -> tuple[StageMemory, ...]:
        """Stages of one method."""
        return tuple(stage for stage in self.stages if stage.method == method)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "target": self.target,
            "setting": dataclasses.asdict(self.setting),
            "stages": [stage.to_dict() for stage in self.stages],
        }


class Planner:
    """Makes plans of one model for one device; what was compiled once is remembered.

    Example:
      >>> from emloc_jax.memory import abstract_model
      >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 8}
      >>> planner = Planner(abstract_model({"model_type": "gpt2", **sizes}))
      >>> plan = planner.plan(["inference", "emloc"], Setting(length=8, lora_rank=2))
      >>> [stage.name for stage in plan.stages]
      ['inference', 'calibrate', 'factorize', 'train', 'choose limit', 'correct', 'merge']
    """

    def __init__(self, abstract: AbstractModel, target: Target | None = None):
        self.abstract = abstract
        self.target = target_named() if target is None else target
        self._known: dict[Any, tuple[StageMemory, ...]] = {}

    def plan(self, methods: Sequence[str], setting: Setting) -> Plan:
        """Figures of every stage of some methods.

        Raises:
          ConfigError: an unknown method, or rows that the model does not read.
          EmlocError: a setting that does not fit the model.
        """
        self.abstract.kind.check(setting)
        makers = [maker for method in methods for maker in stages_of(method)]
        stages = [stage for maker in makers for stage in self.stages(maker, setting)]
        return Plan(self.abstract.name, self.target.name, setting, tuple(stages))

    def stages(self, maker: StageMaker, setting: Setting) -> tuple[StageMemory, ...]:
        """Figures of the stages of one maker (see `register_method`)."""
        key = (maker, relevant(maker, setting))
        if key not in self._known:
            made = maker(self.abstract, setting, self.target)
            self._known[key] = tuple(measure_stage(stage) for stage in made)
        return self._known[key]
