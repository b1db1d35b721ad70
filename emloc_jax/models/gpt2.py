"""GPT-2: learned positions, blocks with norms in front, a final norm and a tied head."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from emloc_jax.models.causal import CausalModel
from emloc_jax.models.gpt2_block import Gpt2Block
from emloc_jax.models.gpt2_config import Gpt2Config
from emloc_jax.models.layer_stack import new_layers
from emloc_jax.models.learned_positions import position_ids
from emloc_jax.models.masks import cache_mask, causal_mask
from emloc_jax.models.plain_layers import new_norm

__all__ = ["Gpt2"]


class Gpt2(CausalModel):
    """A causal language model of the GPT-2 family (Radford et al. 2019); no dropout is applied.

    The parameter tree, with ``{i}`` from 0 to L-1 in the unrolled layout; scanned, ``layers`` has
    no ``{i}`` and every leaf below it has a leading axis L::

        embed_tokens/embedding (V, D)
        embed_positions/embedding (context, D)
        layers/{i}/ln_1/{scale, bias}
        layers/{i}/attn/c_attn/{kernel (D, 3 D), bias}
        layers/{i}/attn/c_proj/{kernel, bias}
        layers/{i}/ln_2/{scale, bias}
        layers/{i}/mlp/{c_fc, c_proj}/{kernel, bias}
        norm/{scale, bias}
        lm_head/kernel (D, V)       only if the head is not tied

    Methods and the other attributes are those of ``CausalModel``.

    Attributes:
        config: the model's shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import Gpt2, Gpt2Config
        >>> config = Gpt2Config(vocab_size=32, hidden_size=16, num_layers=2, num_heads=4,
        ...                     intermediate_size=24, max_position_embeddings=8)
        >>> model, tokens = Gpt2(config, scan_layers=True), jnp.zeros((1, 5), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> params["layers"]["attn"]["c_attn"]["kernel"].shape
        (2, 16, 48)
        >>> jax.jit(model.apply)({"params": params}, tokens).shape
        (1, 5, 32)
    """

    config: Gpt2Config

    def setup(self):
        """Declares the parts; ``layers`` is one block if they are scanned."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(c.initializer_range)
        table: dict[str, Any] = dict(features=c.hidden_size, embedding_init=normal, **dtypes)
        self.embed_tokens = nn.Embed(c.vocab_size, **table)
        self.embed_positions = nn.Embed(c.max_position_embeddings, **table)
        self.layers = new_layers(self.block, c.num_layers, self.scan_layers)
        self.norm = new_norm(c, dtypes)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=normal, **dtypes)

    def embed(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """Tokens plus positions: (B, T, D) in ``dtype``; ``method='embed'``.

        Args:
            tokens: (B, T) int32.
            positions: (B, T) int32, or None for 0, 1, … in every row; negative for padding.
            segments: not read.

        Returns:
            (B, T, D) in ``dtype``.

        Raises:
            DataError: the rows are longer than the context.
        """
        places = position_ids(tokens, positions, self.config.max_position_embeddings)
        return self.embed_tokens(tokens) + self.embed_positions(places)

    @nn.nowrap
    def block(self, name: str | None = None) -> Gpt2Block:
        """A new ``Gpt2Block`` of this model."""
        return Gpt2Block(
            self.config, self.dtype, self.param_dtype, self.attention_implementation, name=name
        )

    @nn.nowrap
    def context(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array | None:
        """The mask of whole sequences; None if every row is one."""
        return None if segments is None else causal_mask(segments)

    @nn.nowrap
    def cache_context(self, positions: Array, cached: Array) -> Array:
        """The mask of new tokens that look into a cache."""
        return cache_mask(positions, cached)
