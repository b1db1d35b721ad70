"""Kernels of a model and the modules that PEFT knows them by."""

from typing import Any

from emloc_jax.errors import AdapterMismatchError
from emloc_jax.models import hf_tensor_names

__all__ = ["has_conv1d", "linear_modules", "tied_head_message"]


def linear_modules(config: Any, *, in_files: bool = False) -> dict[str, tuple[str, int, int]]:
    """Every linear layer: unrolled kernel path -> (module name, d_in, d_out).

    Names are those of transformers' class. Convolutions, and products that are no module of their
    own there, are left out.

    Args:
      config: of the model.
      in_files: names as files have them, which are those of the class of earlier versions.

    >>> from emloc_jax.models import DecoderConfig
    >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4)
    >>> linear_modules(config)["layers/0/self_attn/k_proj/kernel"]
    ('model.layers.0.self_attn.k_proj', 16, 8)
    """
    modules = {}
    for path, tensor in hf_tensor_names(config).items():
        name = tensor.name if in_files else tensor.class_name
        shape = tensor.parameter_shape
        if path.endswith("/kernel") and name.endswith(".weight") and len(shape) == 2:
            modules[path] = (name.removesuffix(".weight"), *shape)
    return modules


def has_conv1d(config: Any) -> bool:
    """Whether kernels are stored (d_in, d_out), as GPT-2's are, which PEFT must be told.

    >>> from emloc_jax.models import Gpt2Config
    >>> has_conv1d(Gpt2Config(32, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8))
    True
    """
    tensors = hf_tensor_names(config).items()
    stored = [tensor for path, tensor in tensors if path.endswith("/kernel")]
    return any(not (tensor.transpose or tensor.axes) for tensor in stored)


def tied_head_message(path: str) -> AdapterMismatchError:
    """The refusal of an adapter on an embedding, for raising."""
    return AdapterMismatchError(
        f"The adapter on '{path}' changes a tied embedding and head at once, which a PEFT LoRA "
        "adapter cannot say. Merge it into the weights (save_pretrained), or leave it out."
    )
