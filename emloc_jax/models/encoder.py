"""BERT and RoBERTa: embeddings, blocks that look both ways, and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.errors import ConfigError
from emloc_jax.models.activations import activation
from emloc_jax.models.encoder_block import EncoderBlock
from emloc_jax.models.encoder_config import EncoderConfig
from emloc_jax.models.layer_stack import Remat, new_layers, run_layers
from emloc_jax.models.learned_positions import position_ids
from emloc_jax.models.masks import segment_mask
from emloc_jax.models.plain_layers import new_dense, new_norm

__all__ = ["Encoder"]


class MaskedLmHead(nn.Module):
    """``tokens · norm(activation(dense(x))) + bias``, the last product with the embedding.

    Attributes:
        config: the encoder's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.dense = new_dense(c, c.hidden_size, dtypes)
        self.norm = new_norm(c, dtypes)
        self.bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), self.param_dtype)

    def __call__(self, x: Array, attend: Callable[[Array], Array]) -> Array:
        """(..., D) to logits (..., V) in ``dtype``; ``attend`` multiplies with the embedding."""
        c = self.config
        # RoBERTa's head has the exact gelu whatever the blocks have.
        act = activation(c.hidden_act if c.model_type == "bert" else "gelu")
        return attend(self.norm(act(self.dense(x)))) + self.bias.astype(self.dtype)


class Encoder(nn.Module):
    """BERT (Devlin et al. 2019, arXiv 1810.04805) or RoBERTa (Liu et al. 2019, arXiv 1907.11692).

    The parameter tree, with ``{i}`` from 0 to L-1 in the unrolled layout; scanned, ``layers`` has
    no ``{i}`` and every leaf below it has a leading axis L::

        embed_tokens/embedding (V, D)
        embed_positions/embedding (context + position_offset, D)
        embed_token_types/embedding (token types, D)
        embed_norm/{scale, bias}
        layers/{i}/attention/{query, key, value, output}/{kernel, bias}
        layers/{i}/attention_norm/{scale, bias}
        layers/{i}/mlp/{intermediate, output}/{kernel, bias}
        layers/{i}/mlp_norm/{scale, bias}
        pooler/{kernel (D, D), bias}                classification, and bare with a pooler
        classifier/{kernel (D, labels), bias}       classification
        masked_lm/dense/{kernel, bias}, masked_lm/norm/{scale, bias}, masked_lm/bias (V,)

    Both families have one form here; RoBERTa's ``classifier.dense`` is the pooler. Every
    projection is a plain ``nn.Dense``. Dropout is not applied: the model is deterministic.

    Attributes:
        config: the encoder's shape, and its head.
        dtype: of the computation, fp32 or bf16. Norms, the softmax and what is returned by
            ``__call__`` are fp32 whatever it is.
        param_dtype: of fresh parameters.
        scan_layers: one compiled block, scanned, instead of L copies.
        remat: see ``CausalModel``.
        attention_implementation: see ``CausalModel``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import Encoder, EncoderConfig
        >>> config = EncoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=2, num_heads=4).with_labels(3)
        >>> model, tokens = Encoder(config, scan_layers=True), jnp.zeros((2, 5), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> jax.jit(model.apply)({"params": params}, tokens).shape
        (2, 3)
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = False
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts; ``layers`` is one block if they are scanned."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(c.initializer_range)
        table: dict[str, Any] = dict(features=c.hidden_size, embedding_init=normal, **dtypes)
        self.embed_tokens = nn.Embed(c.vocab_size, **table)
        rows = c.max_position_embeddings + c.position_offset
        self.embed_positions = nn.Embed(rows, **table)
        self.embed_token_types = nn.Embed(c.type_vocab_size, **table)
        self.embed_norm = new_norm(c, dtypes)
        self.layers = new_layers(self.block, c.num_layers, self.scan_layers)
        if c.pooler:
            self.pooler = new_dense(c, c.hidden_size, dtypes)
        if c.num_labels is not None:
            self.classifier = new_dense(c, c.num_labels, dtypes)
        if c.head == "masked_lm":
            self.masked_lm = MaskedLmHead(c, **dtypes)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        token_types: Array | None = None,
    ) -> Array:
        """What the head makes of the sequences.

        Args:
            tokens: (B, T) int32.
            positions: (B, T) int32, counted from 0 in both families, or None: 0, 1, … in every
                row; RoBERTa does not count padding then, as transformers does not.
            segments: (B, T) int32, 0 for padding; a token sees the tokens of its own segment.
                None: every row is one segment, and no mask is formed.
            token_types: (B, T) int32, or None for 0 everywhere.

        Returns:
            fp32: classification (B, labels), from the first token of each row; masked language
            model (B, T, V); bare encoder (B, T, D), the hidden states.
        """
        hidden = self.hidden(tokens, positions, segments, token_types)
        if self.is_initializing() and self.config.pooler:
            self.pool(hidden)  # a bare encoder does not call it, but has its parameters
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        token_types: Array | None = None,
    ) -> Array:
        """The residual stream after the last block, (B, T, D) in ``dtype``; ``method='hidden'``.

        Args:
            tokens: see ``__call__``.
            positions: see ``__call__``.
            segments: see ``__call__``.
            token_types: see ``__call__``.

        Returns:
            (B, T, D) in ``dtype``.
        """
        context = self.context(tokens, positions, segments)
        return run_layers(
            self.layers,
            lambda block, x, _: block(x, context),
            self.embed(tokens, positions, segments, token_types),
            num_layers=self.config.num_layers,
            scan=self.scan_layers,
            remat=self.remat,
        )

    def embed(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        token_types: Array | None = None,
    ) -> Array:
        """The residual stream before the first block; ``method='embed'``.

        Args:
            tokens: see ``__call__``.
            positions: see ``__call__``.
            segments: see ``__call__``.
            token_types: see ``__call__``.

        Returns:
            (B, T, D) in ``dtype``.

        Raises:
            DataError: the rows are longer than the context.
        """
        c = self.config
        places = position_ids(tokens, positions, c.max_position_embeddings)
        if positions is None and segments is not None and c.model_type == "roberta":
            places = jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0)
        x = self.embed_tokens(tokens) + self.embed_positions(places + c.position_offset)
        types = jnp.zeros((1, 1), jnp.int32) if token_types is None else token_types
        return self.embed_norm(x + self.embed_token_types(types))

    def pool(self, hidden: Array) -> Array:
        """``tanh(pooler(x))`` of the first token; ``method='pool'``.

        Args:
            hidden: (B, T, D), from ``hidden``.

        Returns:
            (B, D) in ``dtype``.

        Raises:
            ConfigError: the model has no pooler.
        """
        if not self.config.pooler:
            raise ConfigError(
                "The pooled vector of an encoder without a pooler was asked for (its head is "
                f"{self.config.head!r}). Take hidden states with method='hidden'."
            )
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def head(self, x: Array) -> Array:
        """The head on the residual stream after the last block: ``logits``; ``method='head'``."""
        return self.logits(x)

    def logits(self, hidden: Array) -> Array:
        """The head; ``method='logits'``.

        Args:
            hidden: (B, T, D), from ``hidden``; for a masked language model (..., D).

        Returns:
            fp32; see ``__call__``.
        """
        if self.config.head == "classification":
            hidden = self.classifier(self.pool(hidden))
        elif self.config.head == "masked_lm":
            hidden = self.masked_lm(hidden, self.embed_tokens.attend)
        return hidden.astype(jnp.float32)

    @nn.nowrap
    def block(self, name: str | None = None) -> EncoderBlock:
        """A new ``EncoderBlock`` of this model."""
        return EncoderBlock(
            self.config, self.dtype, self.param_dtype, self.attention_implementation, name=name
        )

    @nn.nowrap
    def context(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        token_types: Array | None = None,
    ) -> Array | None:
        """What every block reads besides the residual stream: the mask, or None."""
        return None if segments is None else segment_mask(segments)
