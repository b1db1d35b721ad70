"""Linen models (Llama family, GPT-2, BERT, ViT, InternVL, FLUX) and their names in files."""

from emloc_jax.models.architectures import supported_classes
from emloc_jax.models.block_source import BlockSource, MemoryBlocks
from emloc_jax.models.block_stack import BlockStack, block_stack
from emloc_jax.models.cache import grow_cache, init_cache
from emloc_jax.models.causal import CausalModel
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.decoder import Decoder
from emloc_jax.models.encoder import Encoder
from emloc_jax.models.encoder_config import EncoderConfig
from emloc_jax.models.families import supported_architectures
from emloc_jax.models.flux import Flux
from emloc_jax.models.flux_config import FluxConfig
from emloc_jax.models.flux_latents import grid_ids, pack_latents, unpack_latents
from emloc_jax.models.generation import check_settings, choose_token, generate, row_keys
from emloc_jax.models.gpt2 import Gpt2
from emloc_jax.models.gpt2_config import Gpt2Config
from emloc_jax.models.hf_names import hf_storage, hf_tensor_names, is_buffer
from emloc_jax.models.hf_storage import HfStorage, HfTensor
from emloc_jax.models.image_tokens import check_images, image_token_masks
from emloc_jax.models.internvl import InternVL
from emloc_jax.models.internvl_config import InternVLConfig
from emloc_jax.models.layer_layout import layer_depths, stack_layers, unstack_layers
from emloc_jax.models.layer_stack import Remat
from emloc_jax.models.prompts import check_prompts, pad_prompts
from emloc_jax.models.registry import config_from_hf, model_from_config, model_from_hf
from emloc_jax.models.rope import RopeScaling
from emloc_jax.models.sampling import sample_tokens
from emloc_jax.models.vision_config import VisionConfig
from emloc_jax.models.vision_encoder import VisionEncoder

__all__ = [
    "BlockSource",
    "BlockStack",
    "CausalModel",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Flux",
    "FluxConfig",
    "Gpt2",
    "Gpt2Config",
    "HfStorage",
    "HfTensor",
    "InternVL",
    "InternVLConfig",
    "MemoryBlocks",
    "Remat",
    "RopeScaling",
    "VisionConfig",
    "VisionEncoder",
    "block_stack",
    "config_from_hf",
    "check_settings",
    "choose_token",
    "row_keys",
    "check_images",
    "check_prompts",
    "pack_latents",
    "pad_prompts",
    "generate",
    "grid_ids",
    "grow_cache",
    "hf_storage",
    "hf_tensor_names",
    "image_token_masks",
    "init_cache",
    "is_buffer",
    "layer_depths",
    "model_from_config",
    "model_from_hf",
    "sample_tokens",
    "stack_layers",
    "supported_architectures",
    "supported_classes",
    "unpack_latents",
    "unstack_layers",
]
