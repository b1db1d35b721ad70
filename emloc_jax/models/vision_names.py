"""The parameters of ViT, SigLIP's vision tower and InternViT in Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from emloc_jax.models.hf_storage import HfStorage, HfTensor
from emloc_jax.models.vision_config import VisionConfig

__all__ = ["fit_vision_pooler", "vision_storage", "vision_tensors"]


class _Names(NamedTuple):
    """The words of a family; where transformers' class has others than files, behind ``|``."""

    patches: str
    positions: str
    layer: str
    attention_norm: str
    mlp_norm: str
    norm: str
    qkv: str
    output: str
    intermediate: str
    mlp_output: str


_VIT = _Names(
    "embeddings.patch_embeddings.projection",
    "embeddings.position_embeddings",
    "encoder.layer.{}|layers.{}",
    "layernorm_before",
    "layernorm_after",
    "layernorm",
    "attention.attention.{word}|attention.{letter}_proj",
    "attention.output.dense|attention.o_proj",
    "intermediate.dense|mlp.fc1",
    "output.dense|mlp.fc2",
)
_NAMES = {
    "vit": _VIT,
    "siglip": _Names(
        "embeddings.patch_embedding",
        "embeddings.position_embedding.weight",
        "encoder.layers.{}",
        "layer_norm1",
        "layer_norm2",
        "post_layernorm",
        "self_attn.{letter}_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
    "internvl_vision": _VIT._replace(
        layer="encoder.layer.{}",
        qkv="attention.{letter}_proj",
        output="attention.projection_layer",
        intermediate="mlp.fc1",
        mlp_output="mlp.fc2",
    ),
}
_OTHERS = {
    "vit": r"(vit\.)?(pooler\.dense\.\w+|embeddings\.mask_token)|classifier\.\w+|decoder\.0\.\w+",
    "siglip": r"text_model\.[\w.]+|logit_(scale|bias)|classifier\.\w+",
}
_LETTERS = {"query": "q", "key": "k", "value": "v"}


class _Tensors:
    """Tensors by path, as they are named one by one."""

    def __init__(self, file: str, known: str):
        self.file, self.known, self.found = file, known, {}

    def add(self, path: str, name: str, shape: tuple[int, ...], end: str = "", **how: Any) -> None:
        """One tensor; ``name`` as in ``_Names``."""
        in_file = f"{self.file}{_split(name)[0]}{end}"
        known_as = f"{self.known}{_split(name)[1]}{end}"
        known_as = "" if known_as == in_file else known_as
        axes = (2, 3, 1, 0) if len(shape) == 4 else ()
        self.found[path] = HfTensor(in_file, shape, axes=axes, known_as=known_as, **how)

    def linear(self, path: str, name: str, d_in: int, d_out: int, *, bias: bool = True) -> None:
        """A dense layer."""
        self.add(f"{path}/kernel", name, (d_out, d_in), ".weight", transpose=True)
        if bias:
            self.add(f"{path}/bias", name, (d_out,), ".bias")

    def norm(self, path: str, name: str, width: int, *, bias: bool = True) -> None:
        """A norm."""
        self.add(f"{path}/scale", name, (width,), ".weight")
        if bias:
            self.add(f"{path}/bias", name, (width,), ".bias")


def vision_tensors(config: VisionConfig, file: str, known: str) -> dict[str, HfTensor]:
    """Every tensor of an image encoder without its classifier.

    Args:
        config: the encoder's shape.
        file: what precedes the names in files.
        known: what precedes them in transformers' class.

    Returns:
        Path to tensor, in model order.
    """
    c, width = config, config.hidden_size
    names = _NAMES["siglip" if c.model_type.startswith("siglip") else c.model_type]
    t = _Tensors(file, known)
    t.add("embed_patches/kernel", names.patches, (width, c.num_channels, *c.patch_size), ".weight")
    t.add("embed_patches/bias", names.patches, (width,), ".bias")
    if c.class_token:
        t.add("class_token", "embeddings.cls_token", (1, 1, width), units=2)
    units, table = int(c.class_token), (c.num_tokens, width)
    t.add("embed_positions/embedding", names.positions, (1,) * units + table, units=units)
    for index in range(c.num_layers):
        _add_layer(t, c, names, index)
    if c.final_norm:
        t.norm("norm", names.norm, width)
    if c.pooler and c.model_type == "vit":
        t.linear("pooler", "pooler.dense", width, width)
    elif c.pooler:
        t.add("pooler/probe", "head.probe", (1, 1, width), units=2)
        joint = "head.attention.in_proj"
        kernel = "pooler/projections/kernel"
        t.add(kernel, joint, (3 * width, width), "_weight", transpose=True)
        t.add("pooler/projections/bias", joint, (3 * width,), "_bias")
        t.linear("pooler/output", "head.attention.out_proj", width, width)
        t.norm("pooler/norm", "head.layernorm", width)
        t.linear("pooler/mlp/intermediate", "head.mlp.fc1", width, c.intermediate_size)
        t.linear("pooler/mlp/output", "head.mlp.fc2", c.intermediate_size, width)
    return t.found


def vision_storage(config: VisionConfig) -> HfStorage:
    """Tensors of an image encoder with its head.

    Args:
        config: the encoder's shape.

    Returns:
        Its storage. A classifier can be made afresh.
    """
    c = config
    siglip = c.model_type.startswith("siglip")
    own = "vision_model." if siglip else "vit." if c.model_type == "vit" else ""
    base = own if c.head or c.model_type == "siglip" else ""
    tensors = vision_tensors(c, base, base)
    if c.num_labels is not None:
        shape = (c.num_labels, c.hidden_size)
        tensors["classifier/kernel"] = HfTensor("classifier.weight", shape, transpose=True)
        tensors["classifier/bias"] = HfTensor("classifier.bias", shape[:1])
    heads = () if c.num_labels is None else ("classifier",)
    others = _OTHERS.get("siglip" if siglip else c.model_type)
    return HfStorage(tensors, {}, own, heads, None if others is None else re.compile(others))


def fit_vision_pooler(config: VisionConfig, names: Collection[str]) -> VisionConfig:
    """The config with what config.json leaves unsaid: whether a bare ViT has a pooler.

    Args:
        config: from ``VisionConfig.from_hf``.
        names: of the checkpoint's tensors.

    Returns:
        The same config, without a pooler if there is none.
    """
    has = any(re.fullmatch(r"(vit\.)?pooler\.dense\.weight", name) for name in names)
    if config.model_type != "vit" or config.head or has:
        return config
    return dataclasses.replace(config, pooler=False)


def _add_layer(t: _Tensors, c: VisionConfig, names: _Names, index: int) -> None:
    ours, width = f"layers/{index}", c.hidden_size

    def inside(name: str) -> str:
        pairs = zip(_split(names.layer), _split(name), strict=True)
        return "|".join(f"{layer.format(index)}.{part}" for layer, part in pairs)

    t.norm(f"{ours}/attention_norm", inside(names.attention_norm), width, bias=_biased(c))
    for word, letter in _LETTERS.items():
        name = inside(names.qkv.format(word=word, letter=letter))
        t.linear(f"{ours}/attention/{word}", name, width, width, bias=c.qkv_bias)
    t.linear(f"{ours}/attention/output", inside(names.output), width, width)
    if c.qk_norm:
        for word in ("query", "key"):
            name = inside(f"attention.{_LETTERS[word]}_norm")
            t.norm(f"{ours}/attention/{word}_norm", name, width, bias=False)
    t.norm(f"{ours}/mlp_norm", inside(names.mlp_norm), width, bias=_biased(c))
    t.linear(f"{ours}/mlp/intermediate", inside(names.intermediate), width, c.intermediate_size)
    t.linear(f"{ours}/mlp/output", inside(names.mlp_output), c.intermediate_size, width)
    if c.layer_scale:
        t.add(f"{ours}/attention_scale", inside("lambda_1"), (width,))
        t.add(f"{ours}/mlp_scale", inside("lambda_2"), (width,))


def _biased(config: VisionConfig) -> bool:
    return config.norm_type == "layer_norm"


def _split(name: str) -> tuple[str, str]:
    in_file, _, known = name.partition("|")
    return in_file, known or in_file
