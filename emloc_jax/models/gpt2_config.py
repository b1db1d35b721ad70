"""The shape of a GPT-2, to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emloc_jax.models._hf_keys import (
    as_tuple,
    check_plain_sizes,
    from_tuple,
    refuse_options,
    refuse_quantised,
    required,
    the_class,
)

__all__ = ["GPT2_CLASSES", "Gpt2Config"]

GPT2_CLASSES = ("GPT2LMHeadModel",)

# Options that change the function and are not implemented; released models leave them off.
_IMPLEMENTED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
}


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """Everything that fixes the function of a GPT-2, and nothing about how it is run.

    Hashable: it can be an attribute of a linen module and a static argument under jit.

    Attributes:
        vocab_size: rows of the embedding, V.
        hidden_size: width of the residual stream, D; ``n_embd``.
        num_layers: number of blocks, L; ``n_layer``.
        num_heads: heads; divides ``hidden_size``; ``n_head``.
        intermediate_size: width of the MLP; ``n_inner``.
        max_position_embeddings: learned positions, the context; ``n_positions``.
        hidden_act: name of the MLP's activation; ``activation_function``.
        layer_norm_eps: epsilon of every layer norm; ``layer_norm_epsilon``.
        tie_embeddings: the head is the transposed embedding.
        initializer_range: standard deviation of fresh weights.
        bos_token_id: first token of a text, if the model uses one.
        eos_token_ids: tokens that end a text.
        pad_token_id: token that HF pads with; here padding is said by segments, never by a token.

    Example:
        >>> from emloc_jax.models import Gpt2Config
        >>> config = Gpt2Config.from_hf({
        ...     "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 32,
        ...     "n_embd": 16, "n_layer": 2, "n_head": 4})
        >>> config.intermediate_size, config.head_dim, config.tie_embeddings
        (64, 4, True)
        >>> Gpt2Config.from_hf(config.to_hf()) == config
        True
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        check_plain_sizes(self)

    @property
    def model_type(self) -> str:
        """HF's family name."""
        return "gpt2"

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads: every query head has its own."""
        return self.num_heads

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> Gpt2Config:
        """The config that HF's ``config.json`` describes.

        Dropout (``resid_pdrop``, ``embd_pdrop``, ``attn_pdrop``) is never applied.

        Args:
            hf_config: the parsed ``config.json``.

        Returns:
            The equivalent ``Gpt2Config``.

        Raises:
            UnsupportedArchitectureError: another class, or an option that is not implemented; the
                message names it.
            ConfigError: a size is missing or impossible.
        """
        hf = hf_config
        the_class(hf, "gpt2", GPT2_CLASSES)
        refuse_quantised(hf)
        refuse_options(hf, _IMPLEMENTED)
        width = required(hf, "n_embd")
        return cls(
            vocab_size=required(hf, "vocab_size"),
            hidden_size=width,
            num_layers=required(hf, "n_layer"),
            num_heads=required(hf, "n_head"),
            intermediate_size=4 * width if hf.get("n_inner") is None else hf["n_inner"],
            max_position_embeddings=hf.get("n_positions", 1024),
            hidden_act=hf.get("activation_function", "gelu_new"),
            layer_norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
            tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            bos_token_id=hf.get("bos_token_id", 50256),
            eos_token_ids=as_tuple(hf.get("eos_token_id", 50256)),
            pad_token_id=hf.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model.

        Returns:
            A new dict of JSON values.
        """
        return {
            "architectures": [GPT2_CLASSES[0]],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_inner": self.intermediate_size,
            "n_positions": self.max_position_embeddings,
            "activation_function": self.hidden_act,
            "layer_norm_epsilon": self.layer_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": from_tuple(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
