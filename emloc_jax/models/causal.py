"""What all causal language models share: the pass through the layers, the head, the cache."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.models.layer_stack import Remat, run_layers

__all__ = ["CausalModel"]


class CausalModel(nn.Module, abc.ABC):
    """A causal language model but for its parts, which ``Decoder`` and ``Gpt2`` declare.

    A subclass declares ``embed_tokens`` (``nn.Embed``), ``layers`` (of ``new_layers``), ``norm``
    and, unless ``config.tie_embeddings``, ``lm_head`` in its ``setup``, and defines ``embed``,
    ``block``, ``context`` and ``cache_context``.

    Attributes:
        config: shape of the model.
        dtype: of the computation, fp32 or bf16. Norms, the softmax and the returned logits are
            fp32 whatever it is.
        param_dtype: of fresh parameters.
        scan_layers: one compiled block, scanned, instead of L copies.
        remat: what the backward pass finds of each block: all its activations (False or
            ``'none'``), its input, from which the block is recomputed (True or ``'block'``), or
            the results of its matrix products as well (``'dots'``), which costs memory and saves
            time. On CPU XLA drops the barriers that hold the recomputation back, so there it saves
            memory only together with ``scan_layers``.
        attention_implementation: of ``jax.nn.dot_product_attention``; None or ``'xla'``, or
            ``'cudnn'`` for the fused one of NVIDIA GPUs (bf16 only).
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = False
    attention_implementation: str | None = None

    def __call__(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) int32.
            positions: (B, T) int32, or None for 0, 1, … in every row.
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
        context = self.context(tokens, positions, segments)

        def run(block: Any, x: Array, _: Any) -> Array:
            return block(x, context)

        x = self.embed(tokens, positions, segments)
        return self.norm(self._through_layers(run, x, remat=self.remat))

    @abc.abstractmethod
    def embed(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """The residual stream before the first block; ``method='embed'``.

        Args:
            tokens: see ``__call__``.
            positions: see ``__call__``.
            segments: see ``__call__``.

        Returns:
            (B, T, D) in ``dtype``.
        """

    @nn.nowrap
    @abc.abstractmethod
    def block(self, name: str | None = None) -> nn.Module:
        """A new block: ``(x, context) -> x``, and ``decode`` as ``DecoderBlock`` has it.

        Args:
            name: of the submodule; None outside a module.

        Returns:
            The module, unbound unless it is made inside this one.
        """

    @nn.nowrap
    @abc.abstractmethod
    def context(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Any:
        """What every block reads besides the residual stream, computed without parameters.

        Args:
            tokens: see ``__call__``.
            positions: see ``__call__``.
            segments: see ``__call__``.

        Returns:
            Any pytree.
        """

    @nn.nowrap
    @abc.abstractmethod
    def cache_context(self, positions: Array, cached: Array) -> Any:
        """The same for new tokens that look into a cache.

        Args:
            positions: (B, T) int32 of the new tokens; negative for padding.
            cached: (B, S) int32, the position in every slot; negative where it holds nothing.

        Returns:
            Any pytree.
        """

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
        self,
        tokens: Array,
        positions: Array,
        cache: dict[str, Array],
        last_only: bool = False,
        **inputs: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """Logits of new tokens that see the cache and one another; ``method='decode'``.

        Args:
            tokens: (B, T) int32; a whole prompt, or one token per row.
            positions: (B, T) int32; negative for padding, which no token ever sees.
            cache: from ``init_cache`` or the previous call; it must have T free slots.
            last_only: logits of the last of the T tokens only. Prompts are padded on the left, so
                that this is the last real token of every row.
            **inputs: what else ``embed`` takes, tiles of images say.

        Returns:
            (logits (B, T or 1, V) fp32, the cache with the T tokens written).
        """
        slot = cache["length"]
        positions = positions.astype(jnp.int32)
        cached = jax.lax.dynamic_update_slice(cache["positions"], positions, (0, slot))
        context = self.cache_context(positions, cached)

        def run(block: Any, carry: Any, layer: int | Array) -> Any:
            x, kept = carry
            return block.decode(x, kept, layer, slot, context)

        carry = self.embed(tokens, positions, **inputs), (cache["k"], cache["v"])
        x, (keys, values) = self._through_layers(run, carry)
        logits = self.head(x[:, -1:] if last_only else x)
        length = slot + tokens.shape[1]
        return logits, {"k": keys, "v": values, "positions": cached, "length": length}

    def _through_layers(
        self, run: Callable[[Any, Any, Any], Any], carry: Any, *, remat: Remat = False
    ) -> Any:
        layers, count = self.layers, self.config.num_layers
        return run_layers(layers, run, carry, num_layers=count, scan=self.scan_layers, remat=remat)
