"""`emloc plan`: what every stage will take, before anything is allocated."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.table import Table

from emloc_jax._bytes import format_bytes, parse_bytes
from emloc_jax._files import check_new
from emloc_jax.cli._console import results, say, status
from emloc_jax.cli._options import PlanConfig
from emloc_jax.cli._plan_lsp import plan_lsp
from emloc_jax.cli._run import write_json
from emloc_jax.cli._session import packaged
from emloc_jax.errors import ConfigError
from emloc_jax.memory import (
    Budget,
    Plan,
    Planner,
    Setting,
    StageMemory,
    Target,
    abstract_model,
    check_figure,
    draw_plan,
    largest,
    methods,
    require_fits,
    target_named,
)

__all__ = ["run_plan"]


def run_plan(config: PlanConfig) -> None:
    """Prints a plan; with a budget, refuses one that does not fit and names one that does.

    Raises:
      ConfigError: an option that cannot be.
      PlanError: `method` is one method, and it does not fit the budget; or nothing does.
      OutputExistsError: an output exists.
    """
    for path in (config.output, config.figure):
        if path is not None:
            check_new(path)
    if config.figure is not None:
        check_figure()
    if config.method == "lsp":
        plan_lsp(config)
        return
    setting, target = _setting(config), target_named(config.target)
    budget = _budget(config, target)
    abstract = abstract_model(
        packaged(config.source),
        dtype=jnp.dtype(config.dtype),
        compute_dtype=jnp.dtype(config.compute_dtype),
        name=config.source,
    )
    planner = Planner(abstract, target)
    asked = list(methods()) if config.method == "all" else ["inference", config.method]
    asked = list(dict.fromkeys(asked))
    with status(f"Compiling the stages of {config.source}"):
        plan = planner.plan(asked, setting)
    results.print(_table(plan, budget))
    found: dict[str, Any] = {}
    if config.search:
        with status("Searching settings that fit"):
            found = _search(planner, config, setting, budget)
        results.print(_search_table(found, config.method, budget))
    if config.output is not None:
        write_json(Path(config.output), _content(plan, budget, found))
    if config.figure is not None:
        draw_plan(config.figure, plan, budget)
        say(f"Drawn: {config.figure}")
    if config.method not in ("all", "inference"):
        with status("Looking for a setting that fits"):
            require_fits(planner, [config.method], setting, budget)


def _setting(config: PlanConfig) -> Setting:
    return Setting(
        batch_size=config.batch_size * config.accumulation,
        length=config.length,
        ratio=config.ratio,
        where=tuple(config.where),
        lora_where=tuple(config.lora_where),
        lora_rank=config.lora_rank,
        chunk=config.chunk,
        remat=config.remat,
        accumulation=config.accumulation,
        calibration_rows=config.calibration_rows,
        calibration_batch=config.calibration_batch,
        gradients=config.weighting == "two_sided",
        subspace=config.subspace,
        nnz=config.nnz,
        original_on_device=config.original_on_device,
    )


def _budget(config: PlanConfig, target: Target) -> Budget:
    given = config.device_memory
    device = target.memory if given is None else parse_bytes(given)
    host = None if config.host_memory is None else parse_bytes(config.host_memory)
    if config.search and device is None and host is None:
        raise ConfigError(
            "search=true looks for settings that fit a budget: give device_memory (24GiB, say), "
            "host_memory or a target."
        )
    return Budget(device, host)


def _search(
    planner: Planner, config: PlanConfig, setting: Setting, budget: Budget
) -> dict[str, Setting | None]:
    """The largest value of each knob, all else as asked; remat off if that fits."""
    method = "emloc" if config.method == "all" else config.method
    knobs = ["ratio"] if method == "emloc" else []
    knobs += ["batch_size", "length"] + ([] if method == "inference" else ["chunk"])
    found = {knob: largest(planner, [method], setting, budget, knob) for knob in knobs}
    if method not in ("inference", "lsp"):
        faster = setting.replace(remat=False)
        found["remat"] = faster if planner.plan([method], faster).fits(budget) else None
    return found


def _table(plan: Plan, budget: Budget) -> Table:
    reference = next((s.device for s in plan.stages if s.method == "inference"), None)
    caption = f"Compiled for {plan.target}. Budget: {budget}. Peak: on the device, in the largest "
    caption += "program, with what is resident beside it."
    table = Table(title=f"{plan.model}: {plan.setting}", caption=caption)
    for name in ("method", "stage"):
        table.add_column(name)
    for name in ("arguments", "outputs", "temporaries", "donated", "resident", "peak"):
        table.add_column(name, justify="right")
    table.add_column("x inference", justify="right")
    table.add_column("host", justify="right")
    table.add_column("disk", justify="right")
    table.add_column("budget")
    for stage in plan.stages:
        table.add_row(*_row(stage, reference, budget))
    return table


def _row(stage: StageMemory, reference: int | None, budget: Budget) -> list[str]:
    program = stage.program
    host, disk = sum(stage.host.values()), sum(stage.disk.values())
    return [
        stage.method,
        stage.name,
        format_bytes(program.arguments),
        format_bytes(program.outputs),
        format_bytes(program.temporaries),
        format_bytes(program.aliased),
        format_bytes(sum(stage.resident.values())),
        format_bytes(stage.device),
        "" if reference is None else f"{stage.device / reference:.2f}",
        format_bytes(host) if host else "",
        format_bytes(disk) if disk else "",
        _verdict(budget.short(device=stage.device, host=host), budget),
    ]


def _verdict(short: dict[str, int], budget: Budget) -> str:
    if budget.device is None and budget.host is None:
        return ""
    return ", ".join(f"{space} short of {format_bytes(n)}" for space, n in short.items()) or "fits"


def _search_table(found: dict[str, Setting | None], method: str, budget: Budget) -> Table:
    name = "emloc" if method == "all" else method
    table = Table(title=f"Largest that fits {budget}, all else as above ({name})")
    table.add_column("option")
    table.add_column("value", justify="right")
    for knob, setting in found.items():
        table.add_row(knob, _value(knob, setting))
    return table


def _value(knob: str, setting: Setting | None) -> str:
    if knob == "remat":
        return "true" if setting is None else "false"
    if setting is None:
        return "nothing fits"
    if knob == "batch_size":
        return str(setting.micro_batch)
    return str(getattr(setting, knob))


def _content(plan: Plan, budget: Budget, found: dict[str, Setting | None]) -> dict[str, Any]:
    searched = {knob: _value(knob, setting) for knob, setting in found.items()}
    return plan.to_dict() | {
        "budget": {"device": budget.device, "host": budget.host},
        "fits": {
            method: not any(
                budget.short(device=stage.device, host=sum(stage.host.values()))
                for stage in plan.of(method)
            )
            for method in dict.fromkeys(stage.method for stage in plan.stages)
        },
        "largest_that_fits": searched,
    }
