"""InternVL's parameters in Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses

from emloc_jax.models.decoder_names import decoder_storage
from emloc_jax.models.hf_storage import HfStorage, HfTensor
from emloc_jax.models.internvl_config import InternVLConfig
from emloc_jax.models.vision_names import vision_tensors

__all__ = ["internvl_storage"]


def internvl_storage(config: InternVLConfig) -> HfStorage:
    """Tensors of the three parts; files and transformers' class have different prefixes.

    Args:
        config: the model's shape.

    Returns:
        Its storage.
    """
    c = config
    vision = vision_tensors(c.vision, "vision_tower.", "model.vision_tower.")
    tensors = {f"vision/{path}": tensor for path, tensor in vision.items()}
    width = c.vision.hidden_size * c.shuffle**2
    for path, name, shape in (
        ("norm/scale", "layer_norm.weight", (width,)),
        ("norm/bias", "layer_norm.bias", (width,)),
        ("linear_1/kernel", "linear_1.weight", (c.hidden_size, width)),
        ("linear_1/bias", "linear_1.bias", (c.hidden_size,)),
        ("linear_2/kernel", "linear_2.weight", (c.hidden_size, c.hidden_size)),
        ("linear_2/bias", "linear_2.bias", (c.hidden_size,)),
    ):
        in_file = f"multi_modal_projector.{name}"
        tensors[f"projector/{path}"] = HfTensor(
            in_file, shape, transpose=len(shape) == 2, known_as=f"model.{in_file}"
        )
    decoder = decoder_storage(c.text)
    for path, tensor in decoder.tensors.items():
        inner = tensor.name.removeprefix("model.")
        known_as = tensor.name if inner == tensor.name else f"model.language_model.{inner}"
        tensors[path] = dataclasses.replace(
            tensor, name=f"language_model.{tensor.name}", known_as=known_as
        )
    embedding = tensors["embed_tokens/embedding"].name
    # The head is a copy under either of the two names that files may have for it.
    tied = ("language_model.lm_head.weight", "lm_head.weight") if c.tie_embeddings else ()
    return HfStorage(tensors, dict.fromkeys(tied, embedding))
