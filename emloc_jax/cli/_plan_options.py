"""Options of `emloc plan`."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from emloc_jax.cli._options import Dtype, group, option

__all__ = ["HardwareOptions", "PlanConfig"]


@dataclass
class HardwareOptions:
    """Figures of a machine; what is missing can be measured."""

    measure: bool = option(False, "measure on this machine what is not given")
    to_host: str | None = option(None, "link, bytes per second down, e.g. 16GB")
    to_device: str | None = option(None, "link, bytes per second up")
    host_adam: float | None = option(None, "elements that Adam updates on the host, per second")
    flops: float | None = option(None, "matrix products of the device, FLOP/s")
    device_memory: str | None = option(None, "e.g. 24GiB; null: no limit, or as measured")
    host_memory: str | None = option(None, "e.g. 64GiB; null: no limit, or as measured")


@dataclass
class PlanConfig:
    """Say what a run will take, and find settings that fit, without allocating anything."""

    method: Literal[
        "all", "inference", "lora", "streamed_lora", "full", "emulator", "emloc", "lsp"
    ] = option(
        "all",
        "whose stages are planned, beside inference; streamed_lora: method=lora stream=true of "
        "finetune; emulator: training on an emulator that is read without its original; lsp: also "
        "its time on a machine, from the figures under hardware",
    )
    source: str = option(
        MISSING,
        "Hugging Face folder or config.json (no weights needed), hub id, a .gguf, or 'smollm2'",
    )
    target: str = option(
        "here",
        "device to compile for: here, or a card that is not: rtx3090, rtx4090, a100, h100 (needs "
        "JAX's CUDA plugin)",
    )
    device_memory: str | None = option(None, "budget, e.g. 24GiB; null: the card's, or none")
    host_memory: str | None = option(None, "budget of the host, e.g. 64GiB; null: none")
    search: bool = option(False, "find the largest ratio, batch, length and chunk that fit")
    dtype: Dtype = option("bfloat16", "dtype of the parameters")
    compute_dtype: Dtype = option("bfloat16", "dtype of activations and matrix products")
    batch_size: int = option(1, "rows per micro-batch")
    length: int = option(
        1024, "tokens per row; InternVL: of text, beside those of tiles; FLUX: of a prompt"
    )
    tiles: int | None = option(None, "InternVL: tiles of images per row; null: rows have none")
    height: int | None = option(None, "FLUX: of pictures, in pixels; a multiple of 16")
    width: int | None = option(None, "FLUX: of pictures, in pixels; a multiple of 16")
    accumulation: int = option(1, "micro-batches per step")
    ratio: float = option(0.5, "of the emulator: kept parameters / original parameters")
    where: list[str] | None = option(
        None,
        "regular expressions: kernels to compress; null: layers/.*, of an InternVL its language "
        "model (its image encoder: vision/layers/.*), of FLUX (double|single)_layers/.*",
    )
    lora_rank: int = option(8, "rank of the adapters")
    lora_where: list[str] | None = option(None, "kernels that get an adapter; null: see where")
    chunk: int | None = option(None, "tokens whose logits live at once; null: 256")
    remat: Literal["none", "block", "dots"] = option(
        "block", "what the backward pass computes again, see model.remat of finetune"
    )
    weighting: Literal["two_sided", "one_sided"] = option(
        "two_sided", "what calibration measures, see emulator.weighting of finetune"
    )
    calibration_rows: int = option(128, "training rows that calibrate")
    calibration_batch: int = option(1, "of them at a time")
    stream: bool | None = option(
        None,
        "emloc: every stage reads the original a block at a time; false: it stays on the device, "
        "with the second moments; null: true, but false for models of images",
    )
    activations: str | None = option(
        "4GiB", "streamed: activations that may lie in host memory; null: no limit"
    )
    block_inputs: Literal["device", "host", "pinned_host"] = option(
        "device", "streamed_lora: where the blocks' inputs wait for the backward pass"
    )
    choose_limit: bool = option(True, "emloc: the correction's limit is chosen by losses")
    eval_rows: int = option(0, "test rows whose loss is taken; 0: no evaluation")
    eval_batch: int = option(16, "of them at a time")
    subspace: float = option(0.5, "size of LSP-Offload's gradients: a fraction, or from 2 a number")
    nnz: int = option(4, "non-zeros per row of its projectors")
    output: str | None = option(None, "new JSON file; null: only print")
    figure: str | None = option(None, "new PNG with the stages as bars; needs matplotlib")
    clip: bool = option(
        False, "lsp: gradients are clipped, so no update starts in the backward pass"
    )
    train: dict[str, str] | None = option(None, "lsp: treatments, as lsp.train of finetune")
    product: Literal["sparse", "dense"] = option("sparse", "lsp: products with projectors")
    rounding: Literal["nearest", "stochastic", "kahan", "master"] = option(
        "nearest", "lsp: how updates of bfloat16 parameters are rounded"
    )
    link: Literal["plain", "pinned"] = option("plain", "lsp: which copies are measured")
    slowdown: float = option(1.1, "lsp: longest step, as a multiple of Adam in device memory")
    hardware: HardwareOptions = group(HardwareOptions)
