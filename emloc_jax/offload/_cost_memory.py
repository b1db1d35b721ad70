"""Memory of device and host that one training step needs, part by part."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from emloc_jax.offload._schedules import Schedule
from emloc_jax.offload._timeline import Span, Timeline
from emloc_jax.offload._workload import BlockShape, Setting, Workload, dtype_bytes

__all__ = ["device_memory", "host_memory", "peak_alive", "projector_bytes"]

_FP32 = 4
_MOMENTS = 2 * _FP32  # mu and nu


def device_memory(
    workload: Workload, schedule: Schedule, setting: Setting, timeline: Timeline
) -> dict[str, int]:
    """Bytes on the device at the peak of a step, by what holds them.

    Args:
      workload: the model.
      schedule: where Adam runs and whether gradients are compressed.
      setting: of the projectors and the wire.
      timeline: a simulated run; gradients that wait for their download and updates that wait to be
        applied are counted from it.

    Returns:
      `parameters`, `projectors`, `moments`, `activations`, `gradients` (fp32 sums of the block at
      work, or all of them where nothing is updated before the end of the pass; or, if that is more,
      the full gradients of one block in a fit), `in_flight` and `workspace`.
    """
    used = setting if schedule.compress else None
    size = dtype_bytes(workload.param_dtype)
    trained = sum(part.trained for part in workload.parts)
    kept = sum(part.device for part in workload.parts) if schedule.host else trained
    sums = [part.sent(used) + part.device for part in workload.parts]
    # Micro-batches add up on the device; clipping keeps what stays there until the norm is known.
    all_alive = workload.micro_batches > 1 or (workload.clip and not schedule.host)
    gradients = _FP32 * (sum(sums) if all_alive else max(sums))
    if schedule.compress:
        gradients = max(gradients, _FP32 * max(b.kernel_elements for b in workload.blocks))
    in_flight = 0
    if schedule.host:
        ways = (
            (("device", "backward"), ("d2h", "download")),
            (("h2d", "upload"), ("device", "apply")),
        )
        sent = _sent_bytes(workload, used, setting)
        in_flight = peak_alive(timeline, ways, sent)
    projectors = 0
    if schedule.compress:
        projectors = sum(
            projector_bytes(d, s, setting)
            for block in workload.blocks
            for kernel, core in zip(block.kernels, block.cores(setting), strict=True)
            for d, s in zip(kernel, core, strict=True)
        )
    return {
        "parameters": workload.model_bytes + trained * workload.rounding_bytes,
        "projectors": projectors,
        "moments": kept * _MOMENTS,
        "activations": _activations(workload) * size,
        "gradients": gradients,
        "in_flight": in_flight,
        "workspace": workload.workspace,
    }


def host_memory(
    workload: Workload, schedule: Schedule, setting: Setting, timeline: Timeline
) -> dict[str, int]:
    """Bytes on the host at the peak of a step: `moments` and `in_flight` buffers.

    What the process and its data take is not counted.
    """
    if not schedule.host:
        return {"moments": 0, "in_flight": 0}
    used = setting if schedule.compress else None
    ways = (("d2h", "download"), ("host", "adam")), (("host", "adam"), ("h2d", "upload"))
    return {
        "moments": _MOMENTS * sum(part.sent(used) for part in workload.parts),
        "in_flight": peak_alive(timeline, ways, _sent_bytes(workload, used, setting)),
    }


def projector_bytes(d: int, s: int, setting: Setting) -> int:
    """Bytes of one fp32 `SparseProjector` on the device.

    Example:
      >>> projector_bytes(6, 4, Setting(4, nnz=2))
      72
    """
    nnz, slots = setting.nnz, -(-d * setting.nnz // s)
    sparse = d * nnz * (_index_bytes(s - 1) + _FP32) + s * slots * _index_bytes(d * nnz)
    return sparse + (d * s * _FP32 if setting.cached else 0)


def peak_alive(
    timeline: Timeline,
    ways: Sequence[tuple[tuple[str, str], tuple[str, str]]],
    nbytes: Mapping[int, int],
) -> int:
    """Most bytes that are between two pieces of work at any one time.

    Args:
      timeline: spans; what the second piece of work has not ended in stays alive.
      ways: pairs of `(lane, name)`; a block's bytes are alive from the start of the first (its end
        on the device, where the bytes come into being) to the end of the second.
      nbytes: by block.

    Example:
      >>> spans = [Span("d2h", 0, b, "download", b, b + 1) for b in range(3)]
      >>> spans += [Span("host", 0, b, "adam", 3.0 + b, 4.0 + b) for b in range(3)]
      >>> peak_alive(Timeline(spans), [(("d2h", "download"), ("host", "adam"))], {0: 1, 1: 2, 2: 4})
      7
    """
    changes: list[tuple[float, int]] = []
    spans = timeline.spans
    for first, second in ways:
        begin = _times(spans, first, lambda s: s.end if s.lane == "device" else s.start)
        end = _times(spans, second, lambda s: s.end)
        for key, time in begin.items():
            changes.append((time, nbytes[key[1]]))
            changes.append((end.get(key, math.inf), -nbytes[key[1]]))
    # What comes at the very moment something else goes is there before that is gone.
    alive = np.cumsum([size for _, size in sorted(changes, key=lambda c: (c[0], -c[1]))])
    return int(max(alive, default=0))


def _times(
    spans: Sequence[Span], work: tuple[str, str], time: Callable[[Span], float]
) -> dict[tuple[int, int], float]:
    """Of each step and block; of several micro-batches the last."""
    return {(s.step, s.block): time(s) for s in spans if (s.lane, s.name) == work}


def _sent_bytes(workload: Workload, used: Setting | None, setting: Setting) -> dict[int, int]:
    sent = {number: block.sent(used) for number, block in enumerate(workload.blocks)}
    sent[-1] = workload.outside.sent(used)
    return {number: elements * setting.wire_bytes for number, elements in sent.items()}


def _activations(workload: Workload) -> int:
    boundary = sum(_boundary(block) for block in workload.blocks)
    working = max(_working(block) for block in workload.blocks)
    return workload.tokens * (boundary + working)


def _boundary(block: BlockShape) -> int:
    if block.boundary is not None:
        return block.boundary
    return block.kernels[0][0] if block.kernels else 0


def _working(block: BlockShape) -> int:
    return sum(map(sum, block.kernels)) if block.working is None else block.working


def _index_bytes(largest: int) -> int:
    return np.min_scalar_type(largest).itemsize
