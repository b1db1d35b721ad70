"""The shape of a decoder of the Llama family, to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emloc_jax.errors import ConfigError
from emloc_jax.models._hf_config import read_hf_config, write_hf_config
from emloc_jax.models._hf_keys import require_positive
from emloc_jax.models.rope import RopeScaling

__all__ = ["DecoderConfig"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes the function of a decoder, and nothing about how it is run.

    Hashable: it can be an attribute of a linen module and a static argument under jit.

    Attributes:
        model_type: HF's family name; one of ``emloc_jax.models.supported_architectures()``.
        vocab_size: rows of the embedding, V.
        hidden_size: width of the residual stream, D.
        intermediate_size: width of the gated MLP.
        num_layers: number of blocks, L.
        num_heads: query heads, N.
        num_kv_heads: key and value heads; divides ``num_heads`` (grouped-query attention).
        head_dim: width of one head; need not be ``hidden_size / num_heads``.
        max_position_embeddings: the context, in tokens.
        rms_norm_eps: epsilon of every RMS norm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how those frequencies are stretched, or None.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None: all.
        qkv_bias: biases on the q, k and v projections (Qwen2, Llama with ``attention_bias``).
        o_bias: bias on the output projection of attention.
        mlp_bias: biases on the gate, up and down projections.
        qk_norm: RMS norm of each head's queries and keys before rope (Qwen3).
        tie_embeddings: the head is the transposed embedding.
        initializer_range: standard deviation of fresh weights.
        bos_token_id: first token of a text, if the family uses one.
        eos_token_ids: tokens that end a text.
        pad_token_id: token that HF pads with; here padding is said by segments, never by a token.

    Example:
        >>> from emloc_jax.models import DecoderConfig
        >>> config = DecoderConfig.from_hf({
        ...     "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32,
        ...     "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        ...     "num_attention_heads": 4, "num_key_value_heads": 2})
        >>> config.head_dim, config.num_kv_heads, config.rope_theta
        (4, 2, 10000.0)
        >>> DecoderConfig.from_hf(config.to_hf()) == config
        True
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        )
        require_positive(self, sizes)
        if self.sliding_window is not None:
            require_positive(self, ("sliding_window",))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}. "
                "Every key/value head serves the same number of query heads; correct the config."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} is odd, and rotary embeddings turn pairs of features. "
                "Correct the config."
            )

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """The config that HF's ``config.json`` describes.

        Reads the form of transformers 4 (``rope_theta``, ``rope_scaling``) and of transformers 5
        (``rope_parameters``). A key that is absent has the default of its family in transformers.

        Args:
            hf_config: the parsed ``config.json``.

        Returns:
            The equivalent ``DecoderConfig``.

        Raises:
            UnsupportedArchitectureError: a family, or an option of one, that is not implemented;
                the message names it.
            ConfigError: a size is missing or impossible.
        """
        return cls(**read_hf_config(hf_config))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model, in the form that every version of transformers reads.

        Returns:
            A new dict of JSON values, with ``rope_theta`` and ``rope_scaling`` (transformers 5
            turns them into ``rope_parameters`` by itself).
        """
        return write_hf_config(self)
