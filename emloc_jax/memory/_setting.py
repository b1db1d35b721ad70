"""What a plan is made for: the sizes and choices that memory depends on."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np

from emloc_jax.emulator import MomentForm
from emloc_jax.errors import ConfigError

__all__ = ["ROW", "Policy", "Setting"]

ROW = ("length", "tiles", "latents")  # fields that say what a row holds

Policy = Literal["none", "block", "dots"]

Place = Literal["device", "host", "pinned_host"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes and choices of a run, as far as its memory depends on them.

    Attributes:
      batch_size: rows per training step, and per batch of inference.
      length: tokens per row; of an InternVL those of text alone, of FLUX those of a prompt.
      tiles: of images, per row of an InternVL.
      latents: tokens of a picture of FLUX: (height / 16) · (width / 16).
      ratio: of the emulator: kept parameters of every compressed kernel / original ones.
      where: regular expressions of the kernels to compress.
      lora_where: of the kernels that get an adapter.
      lora_rank: of the adapters.
      chunk: tokens whose logits live at once.
      remat: what the backward pass computes again: none, block (from its input), or dots (all but
        matrix products).
      accumulation: micro-batches per step.
      calibration_rows: that calibrate, and that choose the correction's limit.
      calibration_batch: of them at a time on the device.
      gradients: whether calibration measures output gradients (two-sided weighting).
      subspace: of LSP-Offload: a size from 2, or a fraction.
      nnz: of its projectors.
      stream: whether the original is read a block at a time by every stage that needs it, so that
        training holds the emulator alone; else it stays on the device throughout, as `finetune`
        keeps it.
      block_inputs: where streamed LoRA keeps the blocks' inputs: device, host or pinned_host.
      activations: bytes of activations that streamed stages may keep on the host; the rest goes to
        files. None: no limit.
      choose_limit: whether the correction's limit is the one with the lowest loss on the
        calibration rows.
      moments: of the calibration: auto, full or compact (see `calibrate`).
      weighted: whether second moments weigh the correction, so that they are kept until then.
      polish: whether steps of LoRA on the original follow the correction.
      eval_rows: test rows whose loss is taken; 0: no evaluation.
      eval_batch: of them at a time.

    Raises:
      ConfigError: a size that cannot be.
    """

    batch_size: int = 1
    length: int = 1024
    tiles: int = 0
    latents: int = 0
    ratio: float = 0.5
    where: tuple[str, ...] = ("layers/.*",)
    lora_where: tuple[str, ...] = ("layers/.*",)
    lora_rank: int = 8
    chunk: int = 256
    remat: Policy = "block"
    accumulation: int = 1
    calibration_rows: int = 128
    calibration_batch: int = 1
    gradients: bool = True
    subspace: float = 0.5
    nnz: int = 4
    stream: bool = True
    block_inputs: Place = "device"
    activations: int | None = None
    choose_limit: bool = True
    moments: MomentForm = "auto"
    weighted: bool = False
    polish: bool = False
    eval_rows: int = 0
    eval_batch: int = 16

    def __post_init__(self):
        for name in ("batch_size", "length", "lora_rank", "chunk", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.tiles < 0 or self.latents < 0:
            raise ConfigError(
                f"tiles is {self.tiles} and latents {self.latents}; neither can be negative."
            )
        if self.calibration_rows < 1 or self.calibration_batch < 1:
            raise ConfigError("Calibration takes at least one row, and one at a time.")
        if self.remat not in get_args(Policy):
            raise ConfigError(f"remat={self.remat}; it is one of {', '.join(get_args(Policy))}.")
        if self.eval_rows < 0 or self.eval_batch < 1:
            raise ConfigError("Evaluation takes no fewer than 0 rows, and at least one at a time.")
        if self.block_inputs not in get_args(Place):
            raise ConfigError(
                f"block_inputs={self.block_inputs}; it is one of {', '.join(get_args(Place))}."
            )
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio is {self.ratio}; it must lie strictly between 0 and 1.")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be cut into {self.accumulation} equal "
                "micro-batches; make it a multiple."
            )

    @property
    def moment_form(self) -> MomentForm:
        """How second moments are kept: in full where they weigh the correction too."""
        return "full" if self.weighted else self.moments

    @property
    def micro_batch(self) -> int:
        """Rows that are on their way through the model at once."""
        return self.batch_size // self.accumulation

    def batch(self, rows: int | None = None) -> dict[str, Any]:
        """Shapes of a batch of text, as `pad_examples` makes it.

        Example:
          >>> Setting(batch_size=2, length=8).batch()["tokens"].shape
          (2, 8)
        """
        shape = (self.batch_size if rows is None else rows, self.length)
        kinds: dict[str, Any] = {
            name: np.int32 for name in ("tokens", "targets", "positions", "segments")
        }
        kinds["weights"] = np.float32
        return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}

    def replace(self, **changes: Any) -> "Setting":
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __str__(self):
        parts = "" if self.accumulation == 1 else f" in {self.accumulation} micro-batches"
        stream = "" if self.stream else ", stream=false"
        inputs = "" if self.block_inputs == "device" else f", block_inputs={self.block_inputs}"
        tiles = f" and tiles={self.tiles}" if self.tiles else ""
        latents = f" and latents={self.latents}" if self.latents else ""
        chunk = "" if self.latents else f"chunk={self.chunk}, "
        return (
            f"ratio={self.ratio:g}, {self.batch_size} rows of length={self.length}{tiles}{latents}"
            f"{parts}, {chunk}remat={self.remat}{stream}{inputs}"
        )
