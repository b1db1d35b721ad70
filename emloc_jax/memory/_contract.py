"""The contract: a plan that exceeds its budget is refused, with the nearest setting that fits."""

from collections.abc import Iterator, Sequence

from emloc_jax._bytes import format_bytes
from emloc_jax.errors import PlanError
from emloc_jax.memory._methods import stages_of
from emloc_jax.memory._plan import Budget, Plan, Planner
from emloc_jax.memory._search import largest
from emloc_jax.memory._setting import Policy, Setting

__all__ = ["nearest", "require_fits", "smallest"]

_SMALL_CHUNK = 32
_SHORT = 64
_LOWEST_RATIO = 0.01

_ADVICE = {
    "parameters": "a smaller model, method=emloc with a lower ratio, or streamed_lora",
    "trainables": "adapters of a lower rank, or on fewer kernels",
    "optimizer": "adapters of a lower rank, or on fewer kernels",
    "moments": "one-sided weighting, or leaving the widest kernels whole",
    "temporaries": "fewer or shorter rows, or a smaller chunk of logits",
    "original": "a run that reads the original a block at a time",
    "blocks": "a smaller model, or method=emloc with a lower ratio",
    "adapters and optimizer": "adapters of a lower rank, or on fewer kernels",
    "activations": "fewer or shorter rows, or a smaller limit of `activations`",
    "in flight, at most": "a smaller subspace",
}

# Of models that are not read a block at a time.
_HELD_WHOLE = {
    "parameters": "a smaller model, or of its emulator's training alone a lower ratio",
    "original": "a smaller model, or training where only the emulator is read (method=emulator)",
}


def require_fits(
    planner: Planner, methods: Sequence[str], setting: Setting, budget: Budget
) -> Plan:
    """The plan, if every stage of it keeps the budget.

    Raises:
      PlanError: it does not. The message says which stage takes how much, which part of it is the
        largest, and the nearest setting that fits or, if there is none, the least possible.
    """
    plan = planner.plan(methods, setting)
    if plan.fits(budget):
        return plan
    found = nearest(planner, methods, setting, budget)
    if found is not None:
        advice = f"The nearest setting that fits: {found}{_moved(setting, found)}."
    else:
        least = planner.plan(methods, smallest(planner, methods, setting))
        stage, part = least.obstacle, _largest_part(least)
        advice = (
            f"No setting fits: the least possible is {_needs(least, budget)} ({least.setting}), in "
            f"stage '{stage.name}' of {stage.method}, mostly {part}. What would have to give: "
            f"{_advice(planner).get(part, 'the budget')}."
        )
    stage = plan.obstacle
    raise PlanError(
        f"{plan.model} with {setting} needs {_needs(plan, budget)}, but the budget is {budget}. "
        f"The largest stage is '{stage.name}' of {stage.method}: {_list(stage.parts)}. {advice}"
    )


def nearest(
    planner: Planner, methods: Sequence[str], setting: Setting, budget: Budget
) -> Setting | None:
    """The setting that fits with the least change; it was compiled.

    In this order, each on top of what came before: the original read a block at a time, blocks'
    inputs on the host, a smaller chunk of logits and blocks computed again (the same numbers,
    slower), smaller micro-batches (the same numbers up to rounding), a lower ratio where an
    emulator is planned, fewer rows, shorter rows.
    """
    if not planner.plan(methods, smallest(planner, methods, setting)).fits(budget):
        return None
    for candidate in _equivalent(setting, _fields(planner, methods)):
        setting = candidate
        if planner.plan(methods, setting).fits(budget):
            return setting
    for knob in _knobs(planner, methods):
        most = setting.micro_batch if knob == "batch_size" else setting.length
        found = largest(planner, methods, setting, budget, knob, most=most)
        if found is not None:
            return found
        setting = _lowest(setting, knob)
    return None


def _fields(planner: Planner, methods: Sequence[str]) -> set[str]:
    """Fields of a setting that make a difference to some methods on the planner's model."""
    makers = [maker for method in methods for maker in stages_of(method)]
    kind = planner.abstract.kind
    fields = {"chunk", *(field for maker in makers for field in getattr(maker, "fields", ()))}
    without = set() if kind.streams else {"stream"}
    return fields - without - (set() if kind.has_logits else {"chunk"})


def _knobs(planner: Planner, methods: Sequence[str]) -> list[str]:
    """What can be turned down at a price, the cheapest first."""
    ratio = ["ratio"] if "ratio" in _fields(planner, methods) else []
    return [*ratio, "batch_size", "length"]


def smallest(planner: Planner, methods: Sequence[str], setting: Setting) -> Setting:
    """The setting that takes the least of all that `nearest` can propose."""
    *_, setting = [setting, *_equivalent(setting, _fields(planner, methods))]
    for knob in ("ratio", "batch_size", "length"):
        setting = _lowest(setting, knob)
    return setting


def _advice(planner: Planner) -> dict[str, str]:
    return _ADVICE if planner.abstract.kind.streams else _ADVICE | _HELD_WHOLE


def _equivalent(setting: Setting, fields: set[str]) -> Iterator[Setting]:
    """Settings that train the same, each smaller than the one before.

    Args:
      setting: to start from.
      fields: that make a difference, of those that not every stage looks at.
    """
    if "stream" in fields and not setting.stream:
        setting = setting.replace(stream=True)
        yield setting
    if "block_inputs" in fields and setting.block_inputs == "device":
        setting = setting.replace(block_inputs="host")
        yield setting
    if "chunk" in fields:
        setting = setting.replace(chunk=min(setting.chunk, _SMALL_CHUNK))
        yield setting
    policies: tuple[Policy, ...] = ("none", "dots", "block")  # the one that keeps least last
    for policy in policies[policies.index(setting.remat) + 1 :]:
        setting = setting.replace(remat=policy)
        yield setting
    for parts in range(setting.accumulation + 1, setting.batch_size + 1):
        if setting.batch_size % parts == 0:
            setting = setting.replace(accumulation=parts)
            yield setting


def _lowest(setting: Setting, knob: str) -> Setting:
    match knob:
        case "ratio":
            return setting.replace(ratio=min(setting.ratio, _LOWEST_RATIO))
        case "batch_size":
            return setting.replace(batch_size=1, accumulation=1)
        case _:
            return setting.replace(length=min(setting.length, _SHORT))


def _moved(asked: Setting, found: Setting) -> str:
    """What `found` reads or keeps elsewhere than was asked."""
    streamed = ", stream=true" if found.stream != asked.stream else ""
    changed = found.block_inputs != asked.block_inputs
    return streamed + (f", block_inputs={found.block_inputs}" if changed else "")


def _needs(plan: Plan, budget: Budget) -> str:
    needs = {"device memory": (plan.device, budget.device), "host memory": (plan.host, budget.host)}
    return " and ".join(
        f"{format_bytes(used)} of {name}" for name, (used, limit) in needs.items() if limit
    )


def _largest_part(plan: Plan) -> str:
    parts = plan.obstacle.parts
    return max(parts, key=lambda name: parts[name])


def _list(parts: dict[str, int]) -> str:
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in ordered[:4])
