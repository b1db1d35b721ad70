"""The shape of a BERT or RoBERTa encoder, to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.models._hf_keys import (
    as_tuple,
    check_plain_sizes,
    from_tuple,
    refuse_options,
    refuse_quantised,
    require_positive,
    required,
    the_class,
)

__all__ = ["ENCODER_CLASSES", "EncoderConfig"]

# head -> the end of the class that has it
_HEADS = {None: "Model", "classification": "ForSequenceClassification", "masked_lm": "ForMaskedLM"}
_FAMILIES = {"bert": "Bert", "roberta": "Roberta"}
_PAD = {"bert": 0, "roberta": 1}  # pad_token_id where the key is absent
ENCODER_CLASSES = tuple(f + end for f in _FAMILIES.values() for end in _HEADS.values())

# Options that change the function and are not implemented.
_IMPLEMENTED = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Everything that fixes the function of an encoder, and nothing about how it is run.

    Hashable: it can be an attribute of a linen module and a static argument under jit.

    Attributes:
        vocab_size: rows of the embedding, V.
        hidden_size: width of the residual stream, D.
        intermediate_size: width of the MLP.
        num_layers: number of blocks, L.
        num_heads: heads; divides ``hidden_size``.
        model_type: ``'bert'`` or ``'roberta'``.
        head: ``'classification'``, ``'masked_lm'``, or None for the bare encoder.
        num_labels: outputs of a classification head; None without one.
        pooler: a bare encoder has a pooler (a classifier always has, a language model never).
        max_position_embeddings: the context, in tokens. HF's key of that name counts rows of the
            table, of which RoBERTa leaves ``position_offset`` unused.
        type_vocab_size: token types.
        hidden_act: name of the activation.
        layer_norm_eps: epsilon of every layer norm.
        initializer_range: standard deviation of fresh weights.
        bos_token_id: first token of a text, if the family uses one.
        eos_token_ids: tokens that end a text.
        pad_token_id: token that HF pads with; here padding is said by segments, never by a token.

    Example:
        >>> from emloc_jax.models import EncoderConfig
        >>> config = EncoderConfig.from_hf({
        ...     "architectures": ["RobertaForSequenceClassification"], "model_type": "roberta",
        ...     "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        ...     "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 66,
        ...     "id2label": {"0": "no", "1": "yes", "2": "perhaps"}})
        >>> config.head, config.num_labels, config.max_position_embeddings
        ('classification', 3, 64)
        >>> EncoderConfig.from_hf(config.to_hf()) == config
        True
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    model_type: str = "bert"
    head: str | None = None
    num_labels: int | None = None
    pooler: bool = True
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = 0

    def __post_init__(self):
        check_plain_sizes(self)
        require_positive(self, ("type_vocab_size",))
        if self.model_type not in _FAMILIES or self.head not in _HEADS:
            raise ConfigError(
                f"model_type={self.model_type!r} with head={self.head!r} was given; there are "
                f"{list(_FAMILIES)} with {list(_HEADS)}. Correct the config."
            )
        if self.head == "classification":
            require_positive(self, ("num_labels",))
        elif self.num_labels is not None:
            raise ConfigError(
                f"num_labels={self.num_labels} was given with head={self.head!r}; only a "
                "classification head has labels. Use with_labels."
            )
        if self.pooler != (self.head != "masked_lm") and self.head is not None:
            raise ConfigError(
                f"pooler={self.pooler} was given with head={self.head!r}; a classifier has a "
                "pooler and a language model has none. Correct the config."
            )
        if self.model_type == "roberta" and self.pad_token_id is None:
            raise ConfigError(
                "A RoBERTa without pad_token_id was given; its positions are counted from there. "
                "Take the config.json that came with the weights."
            )

    @property
    def position_offset(self) -> int:
        """Row of the position table that the first token takes (RoBERTa: after the padding's)."""
        return 0 if self.model_type == "bert" else (self.pad_token_id or 0) + 1

    @property
    def tie_embeddings(self) -> bool:
        """Whether a head is the transposed embedding."""
        return self.head == "masked_lm"

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def class_name(self) -> str:
        """The class of transformers that this is."""
        return _FAMILIES[self.model_type] + _HEADS[self.head]

    def with_labels(self, num_labels: int) -> EncoderConfig:
        """The same encoder under a classification head.

        Args:
            num_labels: its outputs.

        Returns:
            A new config.

        Raises:
            ConfigError: ``num_labels`` is no positive whole number.
        """
        return dataclasses.replace(self, head="classification", num_labels=num_labels, pooler=True)

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> EncoderConfig:
        """The config that HF's ``config.json`` describes.

        Without ``architectures`` it is the bare encoder. Whether a bare encoder has a pooler is
        not said there, and it is taken to have one; ``load_pretrained`` looks at the tensors.
        Dropout (``hidden_dropout_prob`` and the like) is never applied.

        Args:
            hf_config: the parsed ``config.json``.

        Returns:
            The equivalent ``EncoderConfig``.

        Raises:
            UnsupportedArchitectureError: another class, or an option that is not implemented; the
                message names it.
            ConfigError: a size is missing or impossible.
        """
        hf = hf_config
        model_type, head = _family_and_head(hf)
        refuse_quantised(hf)
        tied = {"tie_word_embeddings": (True,)} if head == "masked_lm" else {}
        refuse_options(hf, _IMPLEMENTED | tied)
        pad = hf.get("pad_token_id", _PAD[model_type])
        offset = (pad or 0) + 1 if model_type == "roberta" else 0
        special = (0, 2) if model_type == "roberta" else (None, None)
        labels = hf.get("id2label") or range(hf.get("num_labels", 2))
        return cls(
            vocab_size=required(hf, "vocab_size"),
            hidden_size=required(hf, "hidden_size"),
            intermediate_size=required(hf, "intermediate_size"),
            num_layers=required(hf, "num_hidden_layers"),
            num_heads=required(hf, "num_attention_heads"),
            model_type=model_type,
            head=head,
            num_labels=len(labels) if head == "classification" else None,
            pooler=head != "masked_lm",
            max_position_embeddings=hf.get("max_position_embeddings", 512) - offset,
            type_vocab_size=hf.get("type_vocab_size", 2),
            hidden_act=hf.get("hidden_act", "gelu"),
            layer_norm_eps=float(hf.get("layer_norm_eps", 1e-12)),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            bos_token_id=hf.get("bos_token_id", special[0]),
            eos_token_ids=as_tuple(hf.get("eos_token_id", special[1])),
            pad_token_id=pad,
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model; labels are named ``LABEL_0`` and on.

        Returns:
            A new dict of JSON values.
        """
        hf: dict[str, Any] = {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.max_position_embeddings + self.position_offset,
            "type_vocab_size": self.type_vocab_size,
            "hidden_act": self.hidden_act,
            "layer_norm_eps": self.layer_norm_eps,
            "position_embedding_type": "absolute",
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": from_tuple(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        if self.num_labels is not None:
            names = [f"LABEL_{label}" for label in range(self.num_labels)]
            hf["id2label"] = {str(label): name for label, name in enumerate(names)}
            hf["label2id"] = {name: label for label, name in enumerate(names)}
        return hf


def _family_and_head(hf: Mapping[str, Any]) -> tuple[str, str | None]:
    named = list(hf.get("architectures") or ())
    by_class = "roberta" if named and str(named[0]).startswith("Roberta") else "bert"
    model_type = hf.get("model_type", by_class)
    if model_type not in _FAMILIES:
        raise UnsupportedArchitectureError(
            f"A model with architectures={named!r} and model_type={model_type!r} was asked for. "
            f"Supported are: {', '.join(ENCODER_CLASSES)}. Use a model of one of these."
        )
    family = _FAMILIES[model_type]
    found = the_class(hf, model_type, [family + end for end in _HEADS.values()])
    heads = {family + end: head for head, end in _HEADS.items()}
    return model_type, None if found is None else heads[found]
