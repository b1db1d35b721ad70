"""The decoder: embedding, a stack of blocks (unrolled or scanned), norm and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.models.block import DecoderBlock
from emloc_jax.models.config import DecoderConfig
from emloc_jax.models.context import cache_context, sequence_context

__all__ = ["Decoder"]


class Decoder(nn.Module):
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

    Every projection is a plain ``nn.Dense`` with a (d_in, d_out) kernel.

    Attributes:
        config: the decoder's shape.
        dtype: of the computation, fp32 or bf16. Norms, rope, the softmax and the returned logits
            are fp32 whatever it is.
        param_dtype: of fresh parameters.
        scan_layers: one compiled block, scanned, instead of L copies.
        remat: recompute each block in the backward pass instead of keeping its activations. On
            CPU XLA drops the barriers that hold the recomputation back, so there it saves memory
            only together with ``scan_layers``.
        attention_implementation: of ``jax.nn.dot_product_attention``; None or ``'xla'``, or
            ``'cudnn'`` for the fused one of NVIDIA GPUs (bf16 only).

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
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts; ``layers`` is one block if they are scanned."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=normal, **dtypes)
        stack: Any = DecoderBlock if self.scan_layers else UnrolledLayers
        self.layers = stack(c, attention_implementation=self.attention_implementation, **dtypes)
        self.norm = nn.RMSNorm(epsilon=c.rms_norm_eps, **dtypes)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=normal, **dtypes)

    def __call__(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) int32.
            positions: (B, T) int32 for rope, or None for 0, 1, … in every row.
            segments: (B, T) int32; a token sees only earlier tokens of its own segment, 0 is
                padding. None: every row is one segment, and no mask is formed.

        Returns:
            (B, T, V) fp32.
        """
        return self.logits(self.hidden(tokens, positions, segments))

    def hidden(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """The residual stream after the final norm; ``method='hidden'``.

        Args:
            tokens: see ``__call__``.
            positions: see ``__call__``.
            segments: see ``__call__``.

        Returns:
            (B, T, D) in ``dtype``.
        """
        context = sequence_context(self.config, tokens.shape[1], positions, segments)

        def run(block: DecoderBlock, x: Array, _: Any) -> Array:
            return block(x, context)

        if self.remat:
            # A scanned body is its own computation, so nothing can be merged across the barrier.
            run = nn.remat(run, prevent_cse=not self.scan_layers)
        return self.norm(self._through_layers(run, self.embed(tokens)))

    def embed(self, tokens: Array) -> Array:
        """The residual stream before the first block; ``method='embed'``.

        Args:
            tokens: (B, T) int32.

        Returns:
            (B, T, D) in ``dtype``.
        """
        return self.embed_tokens(tokens)

    def head(self, x: Array) -> Array:
        """Final norm and logits; ``method='head'``.

        Args:
            x: (..., D), the residual stream after the last block.

        Returns:
            (..., V) fp32.
        """
        return self.logits(self.norm(x))

    def logits(self, hidden: Array) -> Array:
        """The head; ``method='logits'``.

        Args:
            hidden: (..., D), from ``hidden``.

        Returns:
            (..., V) fp32; the product itself runs in ``dtype``.
        """
        tied = self.config.tie_embeddings
        logits = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        return logits.astype(jnp.float32)

    def decode(
        self, tokens: Array, positions: Array, cache: dict[str, Array], last_only: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Logits of new tokens that see the cache and one another; ``method='decode'``.

        Args:
            tokens: (B, T) int32; a whole prompt, or one token per row.
            positions: (B, T) int32; negative for padding, which no token ever sees.
            cache: from ``init_cache`` or the previous call; it must have T free slots.
            last_only: logits of the last of the T tokens only. Prompts are padded on the left, so
                that this is the last real token of every row.

        Returns:
            (logits (B, T or 1, V) fp32, the cache with the T tokens written).
        """
        slot = cache["length"]
        positions = positions.astype(jnp.int32)
        cached = jax.lax.dynamic_update_slice(cache["positions"], positions, (0, slot))
        context = cache_context(self.config, positions, cached)

        def run(block: DecoderBlock, carry: Any, layer: int | Array) -> Any:
            x, kept = carry
            return block.decode(x, kept, layer, slot, context)

        carry = self.embed(tokens), (cache["k"], cache["v"])
        x, (keys, values) = self._through_layers(run, carry)
        logits = self.head(x[:, -1:] if last_only else x)
        length = slot + tokens.shape[1]
        return logits, {"k": keys, "v": values, "positions": cached, "length": length}

    def _through_layers(self, run: Callable[[DecoderBlock, Any, Any], Any], carry: Any) -> Any:
        if not self.scan_layers:
            return self.layers(run, carry)
        scan = nn.scan(
            lambda block, carry, layer: (run(block, carry, layer), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
        )
        return scan(self.layers, carry, jnp.arange(self.config.num_layers))[0]


class UnrolledLayers(nn.Module):
    """Blocks named '0', '1', …, so that parameter paths read ``layers/0/…``.

    Attributes:
        config: the decoder's shape.
        dtype: see ``DecoderBlock``.
        param_dtype: see ``DecoderBlock``.
        attention_implementation: see ``DecoderBlock``.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    attention_implementation: str | None = None

    @nn.compact
    def __call__(self, run: Callable[[DecoderBlock, Any, int], Any], carry: Any) -> Any:
        """Passes ``carry`` through ``run(block, carry, index)`` of every block in turn."""
        for index in range(self.config.num_layers):
            block = DecoderBlock(
                self.config,
                self.dtype,
                self.param_dtype,
                self.attention_implementation,
                name=str(index),
            )
            carry = run(block, carry, index)
        return carry
