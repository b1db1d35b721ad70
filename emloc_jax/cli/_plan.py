"""`emloc plan`: what every stage will take, before anything is allocated."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.box import SIMPLE
from rich.table import Table

from emloc_jax._bytes import format_bytes, parse_bytes
from emloc_jax._files import check_new
from emloc_jax.cli._console import results, say, status
from emloc_jax.cli._plan_lsp import plan_lsp
from emloc_jax.cli._plan_options import PlanConfig
from emloc_jax.cli._plan_setting import plan_setting, planned_methods
from emloc_jax.cli._run import write_json
from emloc_jax.cli._session import packaged
from emloc_jax.errors import ConfigError
from emloc_jax.memory import (
    Budget,
    Plan,
    Planner,
    Policy,
    Setting,
    StageMemory,
    Target,
    abstract_model,
    check_figure,
    draw_plan,
    largest,
    require_fits,
    target_named,
)

__all__ = ["run_plan"]

_WIDTH = 120


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
    target = target_named(config.target)
    budget = _budget(config, target)
    abstract = abstract_model(
        packaged(config.source),
        dtype=jnp.dtype(config.dtype),
        compute_dtype=jnp.dtype(config.compute_dtype),
        name=config.source,
    )
    setting, asked = plan_setting(config, abstract), planned_methods(config, abstract)
    planner = Planner(abstract, target)
    with status(f"Compiling the stages of {config.source}"):
        plan = planner.plan(asked, setting)
    _print(_table(plan, budget))
    found: dict[str, Any] = {}
    if config.search:
        with status("Searching settings that fit"):
            found = _search(planner, config, setting, budget)
        _print(_search_table(found, config.method, budget))
    if config.output is not None:
        write_json(Path(config.output), _content(plan, budget, found))
    if config.figure is not None:
        draw_plan(config.figure, plan, budget)
        say(f"Drawn: {config.figure}")
    if config.method not in ("all", "inference"):
        with status("Looking for a setting that fits"):
            require_fits(planner, [config.method], setting, budget)


def _print(table: Table) -> None:
    """As wide as the figures need where no screen ends."""
    width = results.width
    if not results.is_terminal:
        results.width = max(width, _WIDTH)
    results.print(table)
    results.width = width


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
    """The largest value of each knob, all else as asked; the policy that computes least again."""
    method = "emloc" if config.method == "all" else config.method
    knobs = ["ratio"] if method in ("emloc", "emulator") else []
    knobs += ["batch_size", "length"]
    if method != "inference" and planner.abstract.kind.has_logits:
        knobs.append("chunk")
    found = {knob: largest(planner, [method], setting, budget, knob) for knob in knobs}
    if method not in ("inference", "lsp"):
        found["remat"] = _fastest(planner, method, setting, budget)
    return found


def _fastest(planner: Planner, method: str, setting: Setting, budget: Budget) -> Setting | None:
    policies: tuple[Policy, ...] = ("none", "dots", "block")  # by what is computed twice
    for policy in policies:
        candidate = setting.replace(remat=policy)
        if planner.plan([method], candidate).fits(budget):
            return candidate
    return None


def _table(plan: Plan, budget: Budget) -> Table:
    reference = next((s.device for s in plan.stages if s.method == "inference"), None)
    unit, size = ("GiB", 2**30) if plan.device >= 2**31 else ("MiB", 2**20)
    table = Table(
        title=f"{plan.model}: {plan.setting}",
        caption=f"{unit}, compiled for {plan.target}; budget: {budget}. Arguments to donated: of "
        "the stage's largest program. Held: on the device beside it.",
        box=SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("stage", no_wrap=True)
    for name in ("args", "out", "temp", "donated", "held", "peak", "x inf.", "host", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("budget")
    for stage in plan.stages:
        table.add_row(*_row(stage, reference, budget, size))
    return table


def _row(stage: StageMemory, reference: int | None, budget: Budget, unit: int) -> list[str]:
    program = stage.program
    held = stage.device - program.peak  # less what is resident and an argument as well
    host, disk = sum(stage.host.values()), sum(stage.disk.values())
    sizes = [program.arguments, program.outputs, program.temporaries, program.aliased, held]
    return [
        stage.name if stage.name == stage.method else f"{stage.method} {stage.name}",
        *(_figure(size / unit) for size in [*sizes, stage.device]),
        "" if reference is None else f"{stage.device / reference:.2f}",
        _figure(host / unit) if host else "",
        _figure(disk / unit) if disk else "",
        _verdict(budget.short(device=stage.device, host=host), budget),
    ]


def _figure(size: float) -> str:
    return f"{size:.0f}" if size >= 1000 else f"{size:.2f}" if size < 100 else f"{size:.1f}"


def _verdict(short: dict[str, int], budget: Budget) -> str:
    if budget.device is None and budget.host is None:
        return ""
    return ", ".join(f"{space} +{format_bytes(n)}" for space, n in short.items()) or "fits"


def _search_table(found: dict[str, Setting | None], method: str, budget: Budget) -> Table:
    name = "emloc" if method == "all" else method
    table = Table(title=f"Largest that fits {budget}, all else as above ({name})")
    table.add_column("option")
    table.add_column("value", justify="right")
    for knob, setting in found.items():
        table.add_row(knob, _value(knob, setting))
    return table


def _value(knob: str, setting: Setting | None) -> str:
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
