"""FLUX's parameters in diffusers checkpoints."""

from __future__ import annotations

from emloc_jax.models.flux_config import FluxConfig
from emloc_jax.models.hf_storage import HfStorage, HfTensor

__all__ = ["flux_storage"]

# Ours to theirs, in one layer, where the words differ.
_THEIRS = {
    "attn/to_out": "attn.to_out.0",
    "ff/inner": "ff.net.0.proj",
    "ff/outer": "ff.net.2",
    "ff_context/inner": "ff_context.net.0.proj",
    "ff_context/outer": "ff_context.net.2",
}


def flux_storage(config: FluxConfig) -> HfStorage:
    """Tensors of a FLUX transformer in ``diffusion_pytorch_model.safetensors``.

    Args:
        config: the model's shape.

    Returns:
        Its storage.
    """
    c, width = config, config.hidden_size
    names: dict[str, HfTensor] = {}

    def linear(path: str, name: str, d_in: int, d_out: int) -> None:
        names[f"{path}/kernel"] = HfTensor(f"{name}.weight", (d_out, d_in), transpose=True)
        names[f"{path}/bias"] = HfTensor(f"{name}.bias", (d_out,))

    def layer(ours: str, theirs: str, linears: dict[str, tuple[int, int]], norms: list[str]):
        for path, sizes in linears.items():
            name = _THEIRS.get(path, path.replace("/", "."))
            linear(f"{ours}/{path}", f"{theirs}.{name}", *sizes)
        for norm in norms:
            weight = HfTensor(f"{theirs}.attn.{norm}.weight", (c.head_dim,))
            names[f"{ours}/attn/{norm}/scale"] = weight

    linear("x_embedder", "x_embedder", c.in_channels, width)
    linear("context_embedder", "context_embedder", c.prompt_dim, width)
    conditions = {"timestep_embedder": 256, "text_embedder": c.pooled_dim}
    if c.guidance_embeds:
        conditions["guidance_embedder"] = 256
    for embedder, d_in in conditions.items():
        path, name = f"time_text_embed/{embedder}", f"time_text_embed.{embedder}"
        linear(f"{path}/linear_1", f"{name}.linear_1", d_in, width)
        linear(f"{path}/linear_2", f"{name}.linear_2", width, width)
    for i in range(c.num_layers):
        layer(f"double_layers/{i}", f"transformer_blocks.{i}", *_double(width))
    for i in range(c.num_single_layers):
        layer(f"single_layers/{i}", f"single_transformer_blocks.{i}", *_single(width))
    linear("norm_out/linear", "norm_out.linear", width, 2 * width)
    linear("proj_out", "proj_out", width, c.out_channels)
    return HfStorage(names)


def _double(width: int) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Linear layers of a double-stream block with their sizes, and its norms."""
    square = ["to_q", "to_k", "to_v", "to_out"]
    square += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    linears = {f"{norm}/linear": (width, 6 * width) for norm in ("norm1", "norm1_context")}
    linears |= {f"attn/{name}": (width, width) for name in square}
    for mlp in ("ff", "ff_context"):
        linears |= {f"{mlp}/inner": (width, 4 * width), f"{mlp}/outer": (4 * width, width)}
    return linears, ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]


def _single(width: int) -> tuple[dict[str, tuple[int, int]], list[str]]:
    linears = {"norm/linear": (width, 3 * width)}
    linears |= {f"attn/{name}": (width, width) for name in ("to_q", "to_k", "to_v")}
    linears |= {"proj_mlp": (width, 4 * width), "proj_out": (5 * width, width)}
    return linears, ["norm_q", "norm_k"]
