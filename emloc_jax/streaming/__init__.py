"""Models that are larger than memory: weights on disk or on the host, a block at a time.

Everything here walks a `BlockStack` whose parameters come from a `BlockSource`. The results are
those of the stages that hold the whole model, bit for bit where the layers are scanned.
"""

from emloc_jax.streaming._lora_loss import streamed_loss as streamed_loss
from emloc_jax.streaming._lora_memory import StreamedLoraMemory as StreamedLoraMemory
from emloc_jax.streaming._lora_memory import streamed_lora_programs as streamed_lora_programs
from emloc_jax.streaming._lora_programs import LoraPrograms as LoraPrograms
from emloc_jax.streaming._lora_step import StreamedLoraStep as StreamedLoraStep
from emloc_jax.streaming._walk import walk as walk
