"""A stage of a run as its programs and what lies beside them; and its figures."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from emloc_jax._program import Program, tree_bytes
from emloc_jax._program_memory import ProgramMemory, analysed
from emloc_jax.memory._lapack import lapack_workspace

__all__ = ["Program", "Stage", "StageMemory", "measure_stage", "tree_bytes"]

# Neither changes what is allocated (the assignment of buffers comes first); both save time.
_QUICK: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a method, before anything of it is compiled.

    Attributes:
      name: of the stage.
      method: `inference`, `lora`, `emloc`, ...
      programs: by name; they run one after the other, so that the largest one counts.
      resident: bytes on the device by what they are, there while any of the programs runs and not
        among its arguments (but for what `Program.shared` says); see also `Program.beside`.
      host: bytes of host memory by what they are, there while any of the programs runs; see also
        `Program.host`.
      disk: bytes written to the disk by what they are.
    """

    name: str
    method: str
    programs: Mapping[str, Program]
    resident: Mapping[str, int] = dataclasses.field(default_factory=dict)
    host: Mapping[str, int] = dataclasses.field(default_factory=dict)
    disk: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Figures of a stage.

    Attributes:
      name, method, resident, disk: of the stage.
      host: bytes of host memory by what they are, at their largest sum.
      together: bytes of device and host at their largest sum, which is what a process takes where
        the device computes in the host's memory.
      programs: figures by name of the program.
      parts: bytes on the device at the peak by what they are; they add up to `device`.
      largest: name of the program that makes the peak.
    """

    name: str
    method: str
    programs: dict[str, ProgramMemory]
    parts: dict[str, int]
    largest: str
    resident: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    together: int

    @property
    def device(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.parts.values())

    @property
    def program(self) -> ProgramMemory:
        """Figures of the program that makes the peak."""
        return self.programs[self.largest]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        programs = {
            name: {**memory._asdict(), "peak": memory.peak}
            for name, memory in self.programs.items()
        }
        return {
            "stage": self.name,
            "method": self.method,
            "device": self.device,
            "together": self.together,
            "parts": self.parts,
            "largest_program": self.largest,
            "programs": programs,
            "resident": self.resident,
            "host": self.host,
            "disk": self.disk,
        }


def measure_stage(
    stage: Stage, compile_: Callable[[jax.stages.Lowered], ProgramMemory] | None = None
) -> StageMemory:
    """Compiles a stage's programs and adds up what it needs.

    Args:
      stage: the stage.
      compile_: from a lowered program to its figures; by default compiles it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((256,), jnp.float32)
      >>> program = Program(jax.jit(lambda x: 2 * x).lower(x), {"numbers": 1024})
      >>> found = measure_stage(Stage("double", "demo", {"run": program}, {"else": 100}))
      >>> found.device, found.parts
      (2148, {'numbers': 1024, 'outputs': 1024, 'else': 100})
    """
    compile_ = quick_figures if compile_ is None else compile_
    programs = {
        name: p.lowered if isinstance(p.lowered, ProgramMemory) else compile_(p.lowered)
        for name, p in stage.programs.items()
    }
    peaks = {name: _parts(memory, stage.programs[name]) for name, memory in programs.items()}
    largest = max(peaks, key=lambda name: sum(peaks[name].values()))
    hosts = {name: _add(dict(stage.host), _host(p)) for name, p in stage.programs.items()}
    resident = sum(stage.resident.values())
    together = max(sum(peaks[name].values()) + sum(hosts[name].values()) for name in peaks)
    parts = _add(peaks[largest], stage.resident)
    return StageMemory(
        name=stage.name,
        method=stage.method,
        programs=programs,
        parts=_positive(parts),
        largest=largest,
        resident=dict(stage.resident),
        host=_positive(max(hosts.values(), key=lambda host: sum(host.values()))),
        disk=_positive(stage.disk),
        together=resident + together,
    )


def quick_figures(lowered: jax.stages.Lowered) -> ProgramMemory:
    """Figures of a program that is compiled for them alone: its machine code stays unoptimised."""
    return analysed(lowered.compile(compiler_options=_QUICK))


def _parts(memory: ProgramMemory, program: Program) -> dict[str, int]:
    """What lies on the device while a program runs, by what it is."""
    parts = dict(program.arguments)
    parts["other arguments"] = program.own(memory) - sum(parts.values())
    parts["outputs"] = memory.outputs - memory.aliased
    parts["temporaries"] = memory.temporaries
    return _add(parts, program.beside)


def _host(program: Program) -> dict[str, int]:
    """What lies on the host while a program runs, by what it is."""
    host = dict(program.host)
    if isinstance(program.lowered, jax.stages.Lowered):
        host["LAPACK's workspace"] = lapack_workspace(program.lowered)
    return host


def _add(parts: dict[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """`parts` with more of them."""
    for name, size in more.items():
        parts[name] = parts.get(name, 0) + size
    return parts


def _positive(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
