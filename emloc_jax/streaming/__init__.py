"""Models that are larger than memory: weights on disk or on the host, a block at a time.

Everything here walks a `BlockStack` whose parameters come from a `BlockSource`. The results are
those of the stages that hold the whole model, bit for bit where the layers are scanned.
"""

from emloc_jax.streaming._calibration_programs import calibration_programs as calibration_programs
from emloc_jax.streaming._calibration_programs import factor_bytes as factor_bytes
from emloc_jax.streaming._calibration_programs import (
    factorization_programs as factorization_programs,
)
from emloc_jax.streaming._correct import StreamedCorrection as StreamedCorrection
from emloc_jax.streaming._correction_programs import correction_programs as correction_programs
from emloc_jax.streaming._correction_programs import merge_programs as merge_programs
from emloc_jax.streaming._correction_programs import trial_bytes as trial_bytes
from emloc_jax.streaming._emulate import stream_emulator as stream_emulator
from emloc_jax.streaming._generate import stream_generate as stream_generate
from emloc_jax.streaming._layer_adapters import AdaptedBlocks as AdaptedBlocks
from emloc_jax.streaming._layer_adapters import block_adapters as block_adapters
from emloc_jax.streaming._layer_kernels import LayerKernels as LayerKernels
from emloc_jax.streaming._layer_kernels import layer_kernels as layer_kernels
from emloc_jax.streaming._lora_memory import StreamedLoraMemory as StreamedLoraMemory
from emloc_jax.streaming._lora_memory import streamed_lora_programs as streamed_lora_programs
from emloc_jax.streaming._lora_step import StreamedLoraStep as StreamedLoraStep
from emloc_jax.streaming._loss import stream_loss as stream_loss
from emloc_jax.streaming._loss import stream_losses as stream_losses
from emloc_jax.streaming._loss_programs import loss_programs as loss_programs
from emloc_jax.streaming._merge import stream_merge as stream_merge
from emloc_jax.streaming._model import StreamedModel as StreamedModel
from emloc_jax.streaming._model import streamed_model as streamed_model
from emloc_jax.streaming._shapes import BlockShapes as BlockShapes
from emloc_jax.streaming._shapes import block_shapes as block_shapes
from emloc_jax.streaming._spill import Spill as Spill
from emloc_jax.streaming._walk import walk as walk
