"""Kernels of a decoder and the modules that PEFT knows them by."""

from emloc_jax.errors import AdapterMismatchError
from emloc_jax.models import DecoderConfig, hf_tensor_names

__all__ = ["linear_modules", "tied_head_message"]


def linear_modules(config: DecoderConfig) -> dict[str, tuple[str, int, int]]:
    """Every linear layer: unrolled kernel path -> (module name, d_in, d_out).

    >>> from emloc_jax.models import DecoderConfig
    >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4)
    >>> linear_modules(config)["layers/0/self_attn/k_proj/kernel"]
    ('model.layers.0.self_attn.k_proj', 16, 8)
    """
    return {
        path: (tensor.name.removesuffix(".weight"), tensor.shape[1], tensor.shape[0])
        for path, tensor in hf_tensor_names(config).items()
        if path.endswith("/kernel")
    }


def tied_head_message(path: str) -> AdapterMismatchError:
    """The refusal of an adapter on an embedding, for raising."""
    return AdapterMismatchError(
        f"The adapter on '{path}' changes a tied embedding and head at once, which a PEFT LoRA "
        "adapter cannot say. Merge it into the weights (save_pretrained), or leave it out."
    )
