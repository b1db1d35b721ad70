"""`emloc doctor`: what this machine offers, with advice."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from emloc_jax._bytes import format_bytes
from emloc_jax._files import check_new
from emloc_jax.cli._console import results, status
from emloc_jax.cli._options import DoctorConfig
from emloc_jax.cli._run import write_json
from emloc_jax.errors import ConfigError
from emloc_jax.memory import Advice, MachineFacts, Rates, advise, examine

__all__ = ["doctor_tables", "run_doctor"]

_OPTIONAL = {"torch"}
_COLORS = {"warning": "yellow", "note": "cyan"}


def run_doctor(config: DoctorConfig) -> None:
    """Looks, measures, prints, and writes JSON if that was asked for."""
    if config.output is not None:
        check_new(config.output)
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ConfigError(
            f"There is no folder {folder}. Give one that exists, on the disk where runs will be "
            "written."
        )
    with status("Looking at this machine"):
        facts = examine(folder, measure=config.measure)
    advice = advise(facts)
    for table in doctor_tables(facts):
        results.print(table)
    for item in advice:
        results.print(_paragraph(item), soft_wrap=True)
    if not advice:
        results.print("Nothing to warn of.")
    if config.output is not None:
        content = dataclasses.asdict(facts) | {"advice": [dataclasses.asdict(a) for a in advice]}
        write_json(Path(config.output), content)


def doctor_tables(facts: MachineFacts) -> list[Table]:
    """Software and settings; memory; speeds, if they were measured."""
    tables = [_pairs("Machine", _machine(facts)), _memory(facts)]
    return tables if facts.rates is None else [*tables, _pairs("Speeds", _speeds(facts.rates))]


def _machine(facts: MachineFacts) -> Iterator[tuple[str, str]]:
    yield "backend", facts.jax.backend
    for name, version in facts.versions.items():
        if version is None and name not in _OPTIONAL:
            yield name, "not installed"
        elif name in _OPTIONAL:
            yield name, f"{version or 'not installed'} (not needed)"
        else:
            yield name, str(version)
    host = facts.host
    yield "processors", f"{host.usable_cpus} of {host.cpus} usable"
    yield "swap", "not told" if host.swap is None else format_bytes(host.swap)
    place = facts.place
    disk = f"{format_bytes(place.free)} free of {format_bytes(place.total)}"
    yield "runs are written to", f"{place.folder} ({place.file_system or 'unknown'}, {disk})"
    yield "default matmul precision", facts.jax.matmul_precision or "the backend's own"
    yield from facts.environment.items()


def _memory(facts: MachineFacts) -> Table:
    table = Table(title="Memory")
    for name in ("of", "kind", "size", "free"):
        table.add_column(name, justify="left" if name in ("of", "kind") else "right")
    host = facts.host
    size = host.total if host.container_limit is None else min(host.total, host.container_limit)
    source = "" if size == host.total else ", container"
    table.add_row(f"host{source}", "main memory", format_bytes(size), format_bytes(host.free))
    for device in facts.devices:
        for memory in device.memories:
            of = f"{device.name} ({device.kind})" if device.kind != device.name else device.name
            if memory != device.memories[0] or device.platform == "cpu":
                table.add_row(of, memory, "of the host", "")
            elif device.limit is None:
                table.add_row(of, memory, "not told", "")
            else:
                free = device.limit - (device.in_use or 0)
                table.add_row(of, memory, format_bytes(device.limit), format_bytes(free))
    return table


def _speeds(rates: Rates) -> Iterator[tuple[str, str]]:
    for link in rates.links:
        for way, rate in (("to host", link.to_host), ("to device", link.to_device)):
            yield f"{link.link}, {way}", "the same bytes, no copy" if rate is None else _rate(rate)
    for product in rates.products:
        precision = "" if product.precision is None else f", precision {product.precision}"
        name = f"{product.dtype} product of width {product.width}{precision}"
        yield name, f"{product.flops / 1e9:,.0f} GFLOP/s"
    yield "relative error of a float32 product", f"{rates.fp32_error:.1e}"
    yield "Adam on the host", f"{rates.host_adam / 1e6:,.0f} M elements/s"
    for name, rate in (("disk, written", rates.disk_write), ("disk, read", rates.disk_read)):
        yield name, "cannot be written" if rate is None else _rate(rate)


def _rate(rate: float) -> str:
    return f"{rate / 1e9:,.2f} GB/s"


def _pairs(title: str, rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _paragraph(advice: Advice) -> Any:
    color = _COLORS[advice.level]
    return (
        f"\n[bold {color}]{advice.level}[/] [bold]{escape(advice.what)}[/]\n"
        f"  {escape(advice.why)}\n  {escape(advice.do)}"
    )
