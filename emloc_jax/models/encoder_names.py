"""BERT's and RoBERTa's parameters in Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from emloc_jax.models.encoder_config import EncoderConfig
from emloc_jax.models.hf_storage import HfStorage, HfTensor

__all__ = ["encoder_storage", "fit_pooler"]

# Ours to theirs, in one layer.
_LINEARS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "mlp/intermediate": "intermediate.dense",
    "mlp/output": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
# Heads by family: (pooler and classifier of a classifier, and the parts of a language model's).
_CLASSIFIERS = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
}
_MASKED_LM = {  # dense, norm, bias, and the tied product
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
    + ("cls.predictions.bias", "cls.predictions.decoder"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"),
}
# Pretraining leaves these in checkpoints whose class has no use for them.
_POOLERS = {
    "bert": re.compile(r"(bert\.)?pooler\.dense\.\w+|cls\.seq_relationship\.[\w.]+"),
    "roberta": re.compile(r"(roberta\.)?pooler\.dense\.\w+"),
}
_OTHERS = {
    "bert": re.compile(r"(bert\.)?pooler\.dense\.\w+|cls\.(predictions|seq_relationship)\.[\w.]+"),
    "roberta": re.compile(
        r"(roberta\.)?pooler\.dense\.\w+|lm_head\.(bias|(dense|layer_norm|decoder)\.\w+)"
    ),
}


def encoder_storage(config: EncoderConfig) -> HfStorage:
    """Tensors of an encoder with its head.

    Args:
        config: the encoder's shape.

    Returns:
        Its storage. A masked language model's output product is a copy of the embedding, and a
        pooler or classifier can be made afresh.
    """
    c = config
    own = f"{c.model_type}."
    base = "" if c.head is None else own
    names: dict[str, HfTensor] = {}

    def linear(path: str, name: str, d_in: int, d_out: int) -> None:
        names[f"{path}/kernel"] = HfTensor(f"{name}.weight", (d_out, d_in), transpose=True)
        names[f"{path}/bias"] = HfTensor(f"{name}.bias", (d_out,))

    def norm(path: str, name: str) -> None:
        names[f"{path}/scale"] = HfTensor(f"{name}.weight", (c.hidden_size,))
        names[f"{path}/bias"] = HfTensor(f"{name}.bias", (c.hidden_size,))

    tables = {
        "tokens": ("word", c.vocab_size),
        "positions": ("position", c.max_position_embeddings + c.position_offset),
        "token_types": ("token_type", c.type_vocab_size),
    }
    for path, (name, rows) in tables.items():
        name = f"{base}embeddings.{name}_embeddings.weight"
        names[f"embed_{path}/embedding"] = HfTensor(name, (rows, c.hidden_size))
    norm("embed_norm", f"{base}embeddings.LayerNorm")
    widths = {"mlp/intermediate": (c.hidden_size, c.intermediate_size)}
    widths["mlp/output"] = (c.intermediate_size, c.hidden_size)
    for layer in range(c.num_layers):
        theirs = f"{base}encoder.layer.{layer}"
        for path, name in _LINEARS.items():
            width = widths.get(path, (c.hidden_size, c.hidden_size))
            linear(f"layers/{layer}/{path}", f"{theirs}.{name}", *width)
        for path, name in _NORMS.items():
            norm(f"layers/{layer}/{path}", f"{theirs}.{name}")

    copies: dict[str, str] = {}
    if c.head == "classification":
        pooler, classifier = _CLASSIFIERS[c.model_type]
        linear("pooler", pooler, c.hidden_size, c.hidden_size)
        linear("classifier", classifier, c.hidden_size, c.num_labels or 0)
    elif c.head == "masked_lm":
        dense, layer_norm, bias, product = _MASKED_LM[c.model_type]
        linear("masked_lm/dense", dense, c.hidden_size, c.hidden_size)
        norm("masked_lm/norm", layer_norm)
        names["masked_lm/bias"] = HfTensor(bias, (c.vocab_size,))
        copies[f"{product}.weight"] = f"{own}embeddings.word_embeddings.weight"
        copies[f"{product}.bias"] = bias
    elif c.pooler:
        linear("pooler", "pooler.dense", c.hidden_size, c.hidden_size)
    heads = ("pooler", "classifier") if c.head == "classification" else ()
    # Every tensor of the head at hand must be a parameter; only those of other heads may be left.
    others = _POOLERS if c.head == "masked_lm" else _OTHERS
    return HfStorage(names, copies, own, heads, others[c.model_type])


def fit_pooler(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The config with what config.json leaves unsaid: whether a bare encoder has a pooler.

    Args:
        config: from ``EncoderConfig.from_hf``.
        names: of the checkpoint's tensors.

    Returns:
        The same config, without a pooler if there is none.
    """
    has = any(re.fullmatch(r"(\w+\.)?pooler\.dense\.weight", name) for name in names)
    return config if config.head or has else dataclasses.replace(config, pooler=False)
