"""From figures of a machine and shapes of a model to lane times, iteration time and memory."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emloc_jax.errors import ConfigError
from emloc_jax.offload._cost_memory import device_memory, host_memory
from emloc_jax.offload._lane_times import LaneTimes, closed_form
from emloc_jax.offload._schedules import SCHEDULES, schedule_named
from emloc_jax.offload._simulate import simulate, steady_seconds
from emloc_jax.offload._timeline import Timeline
from emloc_jax.offload._workload import Setting, Workload

__all__ = ["Hardware", "Prediction", "compare", "lane_times", "predict", "predicted_timeline"]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Figures of one machine, measured (`measure_hardware`) or from its data sheet.

    Attributes:
      to_host, to_device: bandwidth of the link, bytes/s.
      host_adam: elements that Adam updates on the host, per second.
      flops: matrix products on the device, FLOP/s.
      forward_seconds, backward_seconds: measured device time of a block at the workload's tokens,
        one for all or one per block; used for every schedule as they are, so what a smaller weight
        gradient saves is not counted. None: from `flops`.
      latency: seconds per transfer of a block.
      compress_rate, apply_rate: multiply-adds/s of the sparse products that compress a gradient
        and lift an update (`apply_rate` also: elements/s of adding a full update). None: free.
      device_adam: elements that Adam updates on the device, per second. None: free.
      device_memory, host_memory: bytes. None: no limit.

    Raises:
      ConfigError: a figure that is not positive, or neither `flops` nor measured seconds.
    """

    to_host: float
    to_device: float
    host_adam: float
    flops: float | None = None
    forward_seconds: float | Sequence[float] | None = None
    backward_seconds: float | Sequence[float] | None = None
    latency: float = 0.0
    compress_rate: float | None = None
    apply_rate: float | None = None
    device_adam: float | None = None
    device_memory: int | None = None
    host_memory: int | None = None

    def __post_init__(self):
        measured = (self.forward_seconds, self.backward_seconds)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_seconds") or value is None:
                continue
            least = value >= 0 if field.name == "latency" else value > 0
            if not (least and math.isfinite(value)):
                raise ConfigError(f"`{field.name}` is {value}; it must be positive and finite.")
        if any(m is None for m in measured) and self.flops is None:
            raise ConfigError(
                "Neither `flops` nor both `forward_seconds` and `backward_seconds` were given; "
                "device time follows from one of them."
            )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one optimizer step will take.

    Attributes:
      schedule: its name.
      setting: subspace, nnz and wire; of `native`, meaningless.
      seconds: iteration time by simulation.
      formula: the same by `closed_form`.
      slowdown: `seconds` over that of `native` by the same figures.
      bytes_to_host, bytes_to_device: over the link.
      device, host: peak bytes by what holds them.
      times: per block and lane.
    """

    schedule: str
    setting: Setting
    seconds: float
    formula: float
    slowdown: float
    bytes_to_host: int
    bytes_to_device: int
    device: Mapping[str, int]
    host: Mapping[str, int]
    times: LaneTimes

    @property
    def device_bytes(self) -> int:
        """Peak of the device's memory."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Peak of the host's memory."""
        return sum(self.host.values())

    def row(self) -> dict[str, Any]:
        """Plain values by name, for a table or JSON."""
        compressed = SCHEDULES[self.schedule].compress
        return {
            "schedule": self.schedule,
            "subspace": self.setting.subspace if compressed else None,
            "nnz": self.setting.nnz if compressed else None,
            "wire": self.setting.wire if SCHEDULES[self.schedule].host else None,
            "seconds": self.seconds,
            "formula": self.formula,
            "slowdown": self.slowdown,
            "bytes_to_host": self.bytes_to_host,
            "bytes_to_device": self.bytes_to_device,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
        }


def lane_times(
    hardware: Hardware, workload: Workload, schedule: str, setting: Setting
) -> LaneTimes:
    """Seconds per block and lane.

    With N tokens and a kernel `(d_in, d_out)`, core `(s_in, s_out)`, by FLOP rate: forward
    2 N d_in d_out, backward as much for the input's gradient, again for recomputation, and for the
    kernel's gradient 2 N d_in d_out or, compressed, 2 N s_in s_out. Compression takes
    N (d_in + d_out) nnz multiply-adds and an update d_in nnz (s_out + d_out); with `cached`
    projectors both are dense products at the FLOP rate.

    Raises:
      ConfigError: an unknown schedule, or `cached` without `flops`.
      ProjectorError: a subspace that does not fit a kernel.

    Example:
      >>> from emloc_jax.offload._workload import BlockShape
      >>> machine = Hardware(16e9, 16e9, 1e9, forward_seconds=0.01, backward_seconds=0.03)
      >>> work = Workload((BlockShape(((4000, 4000),)),) * 4, tokens=1)
      >>> lane_times(machine, work, "lsp", Setting(2000, wire="float32")).d2h.tolist()
      [0.001, 0.001, 0.001, 0.001]
    """
    kind = schedule_named(schedule)
    used = setting if kind.compress else None
    if used is not None and setting.cached and hardware.flops is None:
        raise ConfigError("Cached projectors were asked for, and `flops` is not given; give it.")
    count = len(workload.blocks)
    device = [_device_times(hardware, workload, number, used) for number in range(count)]
    forward, backward, compress, apply = (np.array(column) for column in zip(*device, strict=True))
    parts, embed = list(workload.blocks), workload.embed_seconds
    if kind.host and workload.outside.sent(used):
        # What is trained outside the blocks is one more block, in front of them.
        parts.insert(0, workload.outside)
        forward, embed = np.insert(forward, 0, embed), 0.0
        backward, compress, apply = (np.insert(a, 0, 0.0) for a in (backward, compress, apply))
    common = {"embed": embed, "head": workload.head_seconds}
    if not kind.host:
        trained = np.array([block.trained for block in parts], np.float64)
        update = trained / (hardware.device_adam or math.inf)
        return LaneTimes(len(parts), forward, backward, update=update, **common)
    sent = np.array([part.sent(used) for part in parts], np.float64)
    delay, wire = hardware.latency * (sent > 0), sent * setting.wire_bytes
    return LaneTimes(
        len(parts),
        forward,
        backward,
        compress=compress,
        d2h=delay + wire / hardware.to_host,
        host=sent / hardware.host_adam,
        h2d=delay + wire / hardware.to_device,
        apply=apply,
        **common,
    )


def predict(
    hardware: Hardware, workload: Workload, schedule: str, setting: Setting | None = None
) -> Prediction:
    """Time, traffic and memory of one optimizer step.

    The time is that of the simulated steady state; what waits in the queues there counts as
    memory.

    Args:
      hardware: the machine.
      workload: the model and batch.
      schedule: a name of `SCHEDULES`.
      setting: subspace, nnz and wire; the wire counts for full gradients too.

    Raises:
      ConfigError, ProjectorError: see `lane_times`.

    Example:
      >>> from emloc_jax.offload._workload import BlockShape
      >>> machine = Hardware(16e9, 16e9, 3e9, forward_seconds=0.012, backward_seconds=0.028)
      >>> work = Workload((BlockShape(((4096, 4096),) * 12),) * 8, tokens=512)
      >>> round(predict(machine, work, "offload").slowdown, 1)
      2.8
    """
    setting = Setting() if setting is None else setting
    kind = schedule_named(schedule)
    times = lane_times(hardware, workload, schedule, setting)
    timeline = predicted_timeline(hardware, workload, schedule, setting)
    micro_batches = workload.micro_batches
    native = lane_times(hardware, workload, "native", setting)
    seconds = steady_seconds(timeline)
    moved = 0
    if kind.host:
        used = setting if kind.compress else None
        moved = sum(part.sent(used) for part in workload.parts) * setting.wire_bytes
    return Prediction(
        schedule=schedule,
        setting=setting,
        seconds=seconds,
        formula=closed_form(times, schedule, micro_batches=micro_batches),
        slowdown=seconds / closed_form(native, "native", micro_batches=micro_batches),
        bytes_to_host=moved,
        bytes_to_device=moved,
        device=device_memory(workload, kind, setting, timeline),
        host=host_memory(workload, kind, setting, timeline),
        times=times,
    )


def predicted_timeline(
    hardware: Hardware, workload: Workload, schedule: str, setting: Setting, *, steps: int = 8
) -> Timeline:
    """The simulated lanes, as `simulate` returns them; the outside of the blocks is block -1.

    Raises:
      ConfigError, ProjectorError: see `lane_times`.
    """
    times = lane_times(hardware, workload, schedule, setting)
    kind = schedule_named(schedule)
    used = setting if kind.compress else None
    shifted = times.blocks - len(workload.blocks)
    parts = (workload.outside, *workload.blocks)[-times.blocks :]
    timeline = simulate(
        times,
        schedule,
        steps=steps,
        micro_batches=workload.micro_batches,
        clip=workload.clip,
        nbytes=np.array([part.sent(used) * setting.wire_bytes for part in parts]),
    )
    if not shifted:
        return timeline
    return Timeline(
        span if span.block < 0 else dataclasses.replace(span, block=span.block - shifted)
        for span in timeline.spans
    )


def compare(
    hardware: Hardware, workload: Workload, setting: Setting | None = None
) -> list[Prediction]:
    """Predictions of all schedules at one setting.

    Raises:
      ConfigError, ProjectorError: see `lane_times`.
    """
    return [predict(hardware, workload, schedule, setting) for schedule in SCHEDULES]


def _device_times(
    hardware: Hardware, workload: Workload, number: int, used: Setting | None
) -> tuple[float, float, float, float]:
    """Seconds of forward, backward, compression and application of one block."""
    block, tokens, flops = workload.blocks[number], workload.tokens, hardware.flops
    cores = block.kernels if used is None else block.cores(used)
    forward = _given(hardware.forward_seconds, number, len(workload.blocks))
    backward = _given(hardware.backward_seconds, number, len(workload.blocks))
    if flops is not None:
        products = 2 * tokens * block.kernel_elements + tokens * block.flops
        core_products = 2 * tokens * sum(s_in * s_out for s_in, s_out in cores)
        # Computed again, then the gradients of the input (of attention: of all inputs) and kernel.
        again = products + tokens * block.flops
        forward = products / flops if forward is None else forward
        if backward is None:
            backward = (products + again + core_products) / flops
    assert forward is not None and backward is not None  # Hardware checked
    if used is None:
        added = block.kernel_elements + block.host
        return forward, backward, 0.0, added / (hardware.apply_rate or math.inf)
    pairs = list(zip(block.kernels, cores, strict=True))
    if used.cached:
        assert flops is not None  # lane_times checked
        dense = sum(d_in * s_in + d_out * s_out for (d_in, d_out), (s_in, s_out) in pairs)
        lifts = sum(d_in * s_out * (s_in + d_out) for (d_in, d_out), (s_in, s_out) in pairs)
        return forward, backward, 2 * tokens * dense / flops, 2 * lifts / flops
    sparse = tokens * used.nnz * sum(map(sum, block.kernels))
    lifts = used.nnz * sum(d_in * (s_out + d_out) for (d_in, d_out), (_, s_out) in pairs)
    compress = sparse / (hardware.compress_rate or math.inf)
    return forward, backward, compress, lifts / (hardware.apply_rate or math.inf)


def _given(seconds: float | Sequence[float] | None, number: int, count: int) -> float | None:
    if seconds is None or isinstance(seconds, (int, float)):
        return seconds
    if len(seconds) != count:
        raise ConfigError(
            f"Measured times of {len(seconds)} blocks were given for a model of {count} blocks; "
            "give one time, or one for each block."
        )
    return float(seconds[number])
