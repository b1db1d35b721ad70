"""Which Hugging Face tensor each parameter is, whatever the architecture."""

from __future__ import annotations

import re
from typing import Any

from emloc_jax.models.architectures import architecture_of_config
from emloc_jax.models.hf_storage import HfStorage, HfTensor

__all__ = ["hf_storage", "hf_tensor_names", "is_buffer"]

# What early transformers stored although it is computed, not learned: Llama's rotary table,
# GPT-2's causal mask, BERT's position numbers and zero token types.
_BUFFER = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
    r"|((bert|roberta)\.)?embeddings\.(position_ids|token_type_ids)"
)


def hf_storage(config: Any) -> HfStorage:
    """How the parameters of a model lie in a Hugging Face checkpoint.

    Args:
        config: of any model here, a ``DecoderConfig`` say.

    Returns:
        Its storage.
    """
    return architecture_of_config(config).storage(config)


def hf_tensor_names(config: Any) -> dict[str, HfTensor]:
    """Every parameter of the unrolled tree with its Hugging Face tensor, in model order.

    Args:
        config: of any model here, a ``DecoderConfig`` say.

    Returns:
        Parameter path to ``HfTensor``. With tied embeddings there is no head on either side.

    Example:
        >>> from emloc_jax.models import DecoderConfig, hf_tensor_names
        >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> tensor = hf_tensor_names(config)["layers/0/self_attn/k_proj/kernel"]
        >>> tensor.name, tensor.shape, tensor.parameter_shape
        ('model.layers.0.self_attn.k_proj.weight', (8, 16), (16, 8))
    """
    return dict(hf_storage(config).tensors)


def is_buffer(name: str) -> bool:
    """Whether a checkpoint key is a buffer of old transformers that no parameter stands for.

    Args:
        name: a key of a Hugging Face checkpoint.

    Returns:
        True for the rotary table of early Llama checkpoints, and the like of other families.

    Example:
        >>> from emloc_jax.models import is_buffer
        >>> is_buffer("model.layers.3.self_attn.rotary_emb.inv_freq")
        True
    """
    return _BUFFER.fullmatch(name) is not None
