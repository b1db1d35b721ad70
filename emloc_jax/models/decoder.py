"""The decoder of the Llama family: embedding, blocks with rotary attention, norm and head."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.block import DecoderBlock
from emloc_jax.models.causal import CausalModel
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.context import Context, cache_context, sequence_context
from emloc_jax.models.layer_stack import new_layers

__all__ = ["Decoder"]


class Decoder(CausalModel):
    """A causal language model of the Llama family.

    The parameter tree, with ``{i}`` from 0 to L-1 in the unrolled layout; scanned, ``layers`` has
    no ``{i}`` and every leaf below it has a leading axis L::

        embed_tokens/embedding (V, D)
        layers/{i}/input_layernorm/scale
        layers/{i}/self_attn/{q,k,v,o}_proj/{kernel, bias}
        layers/{i}/self_attn/{q,k}_norm/scale
        layers/{i}/post_attention_layernorm/scale
        layers/{i}/mlp/{gate,up,down}_proj/{kernel, bias}
        norm/scale
        lm_head/kernel (D, V)

    A bias or norm that the config lacks is absent, and so is the head if it is tied.

    Every projection is a plain ``nn.Dense`` with a (d_in, d_out) kernel. Methods and the other
    attributes are those of ``CausalModel``; rope is fp32 whatever ``dtype`` is.

    Attributes:
        config: the decoder's shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> model, tokens = Decoder(config), jnp.zeros((1, 5), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> sorted(params["layers"]["0"]["mlp"])
        ['down_proj', 'gate_proj', 'up_proj']
        >>> jax.jit(model.apply)({"params": params}, tokens).shape
        (1, 5, 32)
    """

    config: DecoderConfig

    @property
    def decoder_config(self) -> DecoderConfig:
        """The decoder's shape; a model with more around it says where that is."""
        return self.config

    def setup(self):
        """Declares the parts; ``layers`` is one block if they are scanned."""
        c = self.decoder_config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=normal, **dtypes)
        self.layers = new_layers(self.block, c.num_layers, self.scan_layers)
        self.norm = nn.RMSNorm(epsilon=c.rms_norm_eps, **dtypes)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=normal, **dtypes)

    def embed(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """The tokens' rows of the embedding: (B, T, D) in ``dtype``; ``method='embed'``."""
        return self.embed_tokens(tokens)

    @nn.nowrap
    def block(self, name: str | None = None) -> DecoderBlock:
        """A new ``DecoderBlock`` of this model."""
        return DecoderBlock(
            self.decoder_config,
            self.dtype,
            self.param_dtype,
            self.attention_implementation,
            name=name,
        )

    @nn.nowrap
    def context(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Context:
        """Rotary tables and the mask of whole sequences."""
        return sequence_context(self.decoder_config, tokens.shape[1], positions, segments)

    @nn.nowrap
    def cache_context(self, positions: Array, cached: Array) -> Context:
        """Rotary tables and the mask of new tokens that look into a cache."""
        return cache_context(self.decoder_config, positions, cached)
