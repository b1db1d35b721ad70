"""Models and adapters on disk: Hugging Face folders, GGUF, PEFT adapters, emulators, Orbax."""

from emloc_jax.checkpoints._adapter_head import AdapterHead as AdapterHead
from emloc_jax.checkpoints._adapter_head import adapter_head as adapter_head
from emloc_jax.checkpoints._checkpoint_blocks import CheckpointBlocks as CheckpointBlocks
from emloc_jax.checkpoints._diffusers_adapter import (
    save_diffusers_adapter as save_diffusers_adapter,
)
from emloc_jax.checkpoints._emulator_blocks import EmulatorBlocks as EmulatorBlocks
from emloc_jax.checkpoints._emulator_config import EmulatorConfig as EmulatorConfig
from emloc_jax.checkpoints._emulator_folder import emulator_config as emulator_config
from emloc_jax.checkpoints._emulator_folder import load_emulator as load_emulator
from emloc_jax.checkpoints._emulator_folder import save_emulator as save_emulator
from emloc_jax.checkpoints._emulator_folder import write_emulator as write_emulator
from emloc_jax.checkpoints._emulator_plan import EmulatorPlan as EmulatorPlan
from emloc_jax.checkpoints._emulator_plan import plan_emulator as plan_emulator
from emloc_jax.checkpoints._fingerprint import StackedSample as StackedSample
from emloc_jax.checkpoints._fingerprint import base_fingerprint as base_fingerprint
from emloc_jax.checkpoints._fingerprint import calibration_fingerprint as calibration_fingerprint
from emloc_jax.checkpoints._fingerprint import stacked_fingerprint as stacked_fingerprint
from emloc_jax.checkpoints._fingerprint import stacked_sample as stacked_sample
from emloc_jax.checkpoints._head_parts import head_parameters as head_parameters
from emloc_jax.checkpoints._head_parts import head_tensors as head_tensors
from emloc_jax.checkpoints._layers import LazyLeaf as LazyLeaf
from emloc_jax.checkpoints._layers import layer_leaves as layer_leaves
from emloc_jax.checkpoints._load_adapter import AdapterInfo as AdapterInfo
from emloc_jax.checkpoints._load_adapter import adapter_info as adapter_info
from emloc_jax.checkpoints._load_adapter import load_adapter as load_adapter
from emloc_jax.checkpoints._orbax import load_orbax as load_orbax
from emloc_jax.checkpoints._orbax import save_orbax as save_orbax
from emloc_jax.checkpoints._packaged import minilm_path as minilm_path
from emloc_jax.checkpoints._packaged import smollm2_path as smollm2_path
from emloc_jax.checkpoints._pretrained import Pretrained as Pretrained
from emloc_jax.checkpoints._pretrained import load_pretrained as load_pretrained
from emloc_jax.checkpoints._save_adapter import save_adapter as save_adapter
from emloc_jax.checkpoints._save_pretrained import PretrainedFiles as PretrainedFiles
from emloc_jax.checkpoints._save_pretrained import pretrained_files as pretrained_files
from emloc_jax.checkpoints._save_pretrained import save_pretrained as save_pretrained
