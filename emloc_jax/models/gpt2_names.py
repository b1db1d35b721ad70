"""GPT-2's parameters in Hugging Face checkpoints."""

from __future__ import annotations

from emloc_jax.models.gpt2_config import Gpt2Config
from emloc_jax.models.hf_storage import HfStorage, HfTensor

__all__ = ["gpt2_storage"]


def gpt2_storage(config: Gpt2Config) -> HfStorage:
    """Tensors of a GPT-2; its ``Conv1D`` kernels are stored (d_in, d_out), as they are here.

    Args:
        config: the model's shape.

    Returns:
        Its storage; published checkpoints leave out the prefix ``transformer.``.
    """
    c = config
    linears = {  # (d_in, d_out)
        "attn/c_attn": (c.hidden_size, 3 * c.hidden_size),
        "attn/c_proj": (c.hidden_size, c.hidden_size),
        "mlp/c_fc": (c.hidden_size, c.intermediate_size),
        "mlp/c_proj": (c.intermediate_size, c.hidden_size),
    }
    embedding = (c.vocab_size, c.hidden_size)
    positions = (c.max_position_embeddings, c.hidden_size)
    names = {
        "embed_tokens/embedding": HfTensor("transformer.wte.weight", embedding),
        "embed_positions/embedding": HfTensor("transformer.wpe.weight", positions),
    }

    def norm(path: str, name: str) -> None:
        names[f"{path}/scale"] = HfTensor(f"transformer.{name}.weight", (c.hidden_size,))
        names[f"{path}/bias"] = HfTensor(f"transformer.{name}.bias", (c.hidden_size,))

    for layer in range(c.num_layers):
        for path, shape in linears.items():
            name = f"transformer.h.{layer}.{path.replace('/', '.')}"
            names[f"layers/{layer}/{path}/kernel"] = HfTensor(f"{name}.weight", shape)
            names[f"layers/{layer}/{path}/bias"] = HfTensor(f"{name}.bias", shape[1:])
        for path in ("ln_1", "ln_2"):
            norm(f"layers/{layer}/{path}", f"h.{layer}.{path}")
    norm("norm", "ln_f")
    if c.tie_embeddings:
        return HfStorage(names, {"lm_head.weight": "transformer.wte.weight"}, "transformer.")
    names["lm_head/kernel"] = HfTensor("lm_head.weight", embedding, transpose=True)
    return HfStorage(names, prefix="transformer.")
