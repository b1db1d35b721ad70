"""One linen decoder for the Llama family, its Hugging Face names, and generation."""

from emloc_jax.models.block_stack import BlockStack, block_stack
from emloc_jax.models.cache import grow_cache, init_cache
from emloc_jax.models.chat import encode_chat
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.decoder import Decoder
from emloc_jax.models.families import supported_architectures
from emloc_jax.models.generation import generate
from emloc_jax.models.hf_names import HfTensor, hf_tensor_names, is_buffer
from emloc_jax.models.layer_layout import stack_layers, unstack_layers
from emloc_jax.models.registry import model_from_hf
from emloc_jax.models.rope import RopeScaling
from emloc_jax.models.sampling import sample_tokens

__all__ = [
    "BlockStack",
    "Decoder",
    "DecoderConfig",
    "HfTensor",
    "RopeScaling",
    "block_stack",
    "encode_chat",
    "generate",
    "grow_cache",
    "hf_tensor_names",
    "init_cache",
    "is_buffer",
    "model_from_hf",
    "sample_tokens",
    "stack_layers",
    "supported_architectures",
    "unstack_layers",
]
