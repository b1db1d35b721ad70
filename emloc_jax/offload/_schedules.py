"""The ways to run one optimizer step of a block stack, by name."""

import dataclasses

from emloc_jax.errors import ConfigError

__all__ = ["SCHEDULES", "Schedule", "schedule_named"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is sent where, and when.

    Attributes:
      name: key of `SCHEDULES`.
      compress: gradients of the chosen kernels are compressed by sparse projectors.
      host: Adam's moments live on the host, so gradients and updates cross the link.
      layerwise: a block's update starts as soon as its gradient is there, and only its own next
        forward waits for it; otherwise all updates wait for the end of the backward pass, and the
        next forward for all of them.
      delayed: updates are applied one step late, after the forward and backward pass that follow
        (those of leaves that stay on the device at once).
    """

    name: str
    compress: bool
    host: bool
    layerwise: bool
    delayed: bool = False


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("native", compress=False, host=False, layerwise=True),
        Schedule("offload", compress=False, host=True, layerwise=False),
        Schedule("offload_delayed", compress=False, host=True, layerwise=False, delayed=True),
        Schedule("layerwise", compress=False, host=True, layerwise=True),
        Schedule("lsp_serial", compress=True, host=True, layerwise=False),
        Schedule("lsp", compress=True, host=True, layerwise=True),
    )
}


def schedule_named(name: str) -> Schedule:
    """The schedule called `name`.

    `native` is Adam in device memory; `offload` is the full-gradient host offload of ZeRO-Offload
    (arXiv 2101.06840) and `offload_delayed` its one-step delayed update; `layerwise` is the
    schedule of LSP-Offload (arXiv 2406.10181, section on the layer-wise schedule) without
    compression, `lsp_serial` the compression without the schedule, and `lsp` both.

    Raises:
      ConfigError: an unknown name.

    Example:
      >>> schedule_named("lsp").compress
      True
    """
    if name not in SCHEDULES:
        raise ConfigError(f"The schedule '{name}' is unknown; there are {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]
