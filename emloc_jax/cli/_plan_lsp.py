"""`emloc plan method=lsp`: time and memory of LSP-Offload on a machine, by its cost model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from emloc_jax._bytes import format_bytes, parse_bytes
from emloc_jax._files import check_new
from emloc_jax.cli._console import results, status
from emloc_jax.cli._plan_options import HardwareOptions, PlanConfig
from emloc_jax.cli._plan_setting import require_text
from emloc_jax.cli._run import write_json
from emloc_jax.cli._session import packaged
from emloc_jax.errors import ConfigError
from emloc_jax.kernels import flatten_leaves
from emloc_jax.memory import abstract_model
from emloc_jax.models import block_stack
from emloc_jax.offload import (
    AdamOptions,
    BlockShape,
    DevicePutLink,
    Hardware,
    PinnedHostLink,
    Plan,
    Workload,
    adam_direction,
    choose,
    compare,
    default_rules,
    init_moments,
    make_plan,
    match_treatments,
    measure_hardware,
)

__all__ = ["plan_lsp"]

_ROUNDING_BYTES = {"nearest": 0, "stochastic": 0, "kahan": 2, "master": 4}


def plan_lsp(config: PlanConfig) -> None:
    """Chooses subspace, nnz and wire for a machine, and compares the schedules."""
    if config.output is not None:
        check_new(config.output)
    workload = workload_of(config)
    hardware = hardware_of(config)
    choice = choose(hardware, workload, slowdown=config.slowdown, cached=config.product == "dense")
    predictions = compare(hardware, workload, choice.setting)
    results.print(_table("Settings", choice.rows(), _SETTING_COLUMNS))
    rows = [prediction.row() for prediction in predictions]
    results.print(_table(f"One step with {choice.setting}", rows, _SCHEDULE_COLUMNS))
    if config.output is not None:
        content = {
            "hardware": dataclasses.asdict(hardware),
            "chosen": dataclasses.asdict(choice.setting),
            "settings": choice.rows(),
            "schedules": rows,
        }
        write_json(Path(config.output), content)


def workload_of(config: PlanConfig) -> Workload:
    """Shapes of the model, with the treatments that the rules give its parameters.

    Raises:
      ConfigError: no language model, or sizes below 1.
      UnmatchedRuleError, UnsupportedKernelError: rules that do not fit the model.
    """
    if config.batch_size < 1 or config.length < 1:
        raise ConfigError("batch_size and length must be at least 1.")
    abstract = abstract_model(packaged(config.source), name=config.source)
    require_text(config, abstract)
    model = abstract.model
    stack = block_stack(model)
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    outer = jax.eval_shape(stack.outer, params)
    block = jax.eval_shape(lambda tree: stack.block_params(tree, 0), params)
    x, context = jax.eval_shape(stack.embed, outer, tokens)
    names = [f"{stack.name}/{path}" for path in flatten_leaves(block)]
    rules = default_rules(stack.name) if config.train is None else config.train
    treatments = match_treatments(rules, [*names, *flatten_leaves(outer)])
    inside = make_plan(
        block,
        treatments,
        prefix=stack.name,
        apply=lambda variables, *inputs: stack.block(variables["params"], *inputs),
        inputs=(x, context),
    )
    return Workload(
        blocks=(_shape(inside, block),) * stack.num_blocks,
        tokens=config.batch_size * config.length,
        outside=_shape(make_plan(outer, treatments), outer),
        param_dtype=config.dtype,
        rounding_bytes=_ROUNDING_BYTES[config.rounding],
        micro_batches=config.accumulation,
        clip=config.clip,
    )


def _shape(plan: Plan, params: Any) -> BlockShape:
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten_leaves(params).items()}
    kernels = tuple((spec.d_in, spec.d_out) for spec in plan.kernels.values())
    trained = {*plan.kernels, *plan.host, *plan.device}
    return BlockShape(
        kernels,
        host=sum(sizes[path] for path in plan.host),
        device=sum(sizes[path] for path in plan.device),
        frozen=sum(size for path, size in sizes.items() if path not in trained),
    )


def hardware_of(config: PlanConfig) -> Hardware:
    """Figures that were given; the rest is measured if that was asked for.

    Raises:
      ConfigError: a figure is missing and nothing is to be measured.
    """
    options = config.hardware
    given = _given(options)
    if options.measure:
        link = PinnedHostLink() if config.link == "pinned" else DevicePutLink()
        with status("Measuring this machine"):
            return measure_hardware(link, _host_adam(), **given)
    missing = [name for name in ("to_host", "to_device", "host_adam", "flops") if name not in given]
    if missing:
        raise ConfigError(
            f"The plan needs hardware.{', hardware.'.join(missing)}. Give them, or let this "
            "machine be measured with hardware.measure=true."
        )
    return Hardware(**given)


def _given(options: HardwareOptions) -> dict[str, Any]:
    sizes = ("to_host", "to_device", "device_memory", "host_memory")
    found = {name: getattr(options, name) for name in (*sizes, "host_adam", "flops")}
    given = {name: value for name, value in found.items() if value is not None}
    return {name: parse_bytes(v) if name in sizes else v for name, v in given.items()}


def _host_adam() -> Any:
    cpu = jax.local_devices(backend="cpu")[0]
    moments: dict[int, Any] = {}
    update = jax.jit(lambda g, m: adam_direction(g, m, AdamOptions()), donate_argnums=1)

    def run(gradient: np.ndarray) -> Any:
        with jax.default_device(cpu):
            state = moments.pop(gradient.size, None) or init_moments(gradient.shape)
            direction, moments[gradient.size] = update(gradient, state)
            return direction

    return run


_SETTING_COLUMNS = {
    "subspace": "subspace",
    "nnz": "nnz",
    "wire": "wire",
    "slowdown": "x native",
    "device_bytes": "device",
    "host_bytes": "host",
    "verdict": "verdict",
}
_SCHEDULE_COLUMNS = {
    "schedule": "schedule",
    "seconds": "seconds",
    "slowdown": "x native",
    "bytes_to_host": "to host",
    "bytes_to_device": "to device",
    "device_bytes": "device",
    "host_bytes": "host",
}


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    table = Table(title=title)
    for name, label in columns.items():
        table.add_column(label, justify="left" if name in ("verdict", "schedule") else "right")
    for row in rows:
        table.add_row(*(_cell(name, row.get(name)) for name in columns))
    return table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if "bytes" in name:
        return format_bytes(value)
    if name == "verdict":
        return value.split(":")[0]  # the details are in the JSON
    return f"{value:.3g}" if isinstance(value, float) else str(value)
