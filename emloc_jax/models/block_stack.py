"""The block-stack protocol: a model as embed, one block at a time, and head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.errors import ConfigError
from emloc_jax.models.causal import CausalModel
from emloc_jax.models.encoder import Encoder
from emloc_jax.models.vision_encoder import VisionEncoder

__all__ = ["BlockStack", "block_stack"]


@dataclasses.dataclass(frozen=True)
class BlockStack:
    """A model that can be walked block by block, in the memory of one block.

    ``head(params, block(…block(embed(params, …)…)))`` is the model. Whoever has another model
    declares the same callables for it.

    Attributes:
        num_blocks: L.
        embed: ``(params, *inputs) -> (x, context)``; ``context`` is any pytree that every block
            reads.
        block: ``(block_params, x, context) -> x``, one function for all blocks.
        head: ``(params, x) -> outputs``.
        block_params: ``(params, index) -> block_params``.
        outer: ``params -> outer``, the parameters outside the blocks; ``embed`` and ``head`` take
            them in place of all parameters.
        join: ``(outer, [block_params, …]) -> params``, the inverse of ``outer`` and
            ``block_params``.
        name: what the blocks are called in parameter paths.
    """

    num_blocks: int
    embed: Callable[..., tuple[Any, Any]]
    block: Callable[[Any, Any, Any], Any]
    head: Callable[[Any, Any], Any]
    block_params: Callable[[Any, int], Any]
    outer: Callable[[Any], Any]
    join: Callable[[Any, Sequence[Any]], Any]
    name: str = "layers"

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """The whole model by composition, for tests and as the definition.

        Args:
            params: the model's parameters.
            *inputs: what the model takes.

        Returns:
            What the model returns.
        """
        x, context = self.embed(params, *inputs)
        for index in range(self.num_blocks):
            x = self.block(self.block_params(params, index), x, context)
        return self.head(params, x)


def block_stack(
    model: CausalModel | Encoder | VisionEncoder,
    *,
    wrap: Callable[[Callable], Callable] = lambda apply: apply,
) -> BlockStack:
    """The block stack of any model of this room, for either layout of its layers.

    Args:
        model: a ``Decoder``, ``Gpt2``, ``Encoder``, ``VisionEncoder`` or ``InternVL`` (whose blocks
            are the decoder's); its methods ``embed``, ``context``,
            ``block`` and ``head`` are the parts.
        wrap: turns the ``apply`` of each part into another, ``kernels.intercept`` say, so that
            boxed kernels take their fast path here too.

    Returns:
        The stack; ``embed`` takes ``(params, tokens, positions=None, segments=None)``, for an
        ``Encoder`` ``token_types=None`` as well, for an ``InternVL`` ``pixels=None``, and for a
        ``VisionEncoder`` only ``(params, pixels)``.

    Raises:
        ConfigError: a model of another room.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import Decoder, DecoderConfig, block_stack
        >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
        >>> model, tokens = Decoder(config), jnp.zeros((1, 5), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> stack = block_stack(model)
        >>> x, context = stack.embed(params, tokens)
        >>> for index in range(stack.num_blocks):
        ...     x = jax.jit(stack.block)(stack.block_params(params, index), x, context)
        >>> stack.head(params, x).shape
        (1, 5, 32)
    """
    if not isinstance(model, CausalModel | Encoder | VisionEncoder):
        raise ConfigError(
            f"The block stack of a {type(model).__name__} was asked for; those of this room's "
            "models are known. Declare a BlockStack for a model of yours."
        )
    apply_model, apply_block = wrap(model.apply), wrap(model.block().apply)

    def embed(params, *inputs, **named):
        x = apply_model({"params": params}, *inputs, method="embed", **named)
        return x, model.context(*inputs, **named)

    def run_block(block_params, x, context):
        return apply_block({"params": block_params}, x, context)

    def head(params, x):
        return apply_model({"params": params}, x, method="head")

    def block_params(params, index):
        if model.scan_layers:
            return jax.tree.map(lambda leaf: leaf[index], params["layers"])
        return params["layers"][str(index)]

    def outer(params):
        return {key: value for key, value in params.items() if key != "layers"}

    def join(outer, blocks):
        if model.scan_layers:
            return {**outer, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
        return {**outer, "layers": {str(index): block for index, block in enumerate(blocks)}}

    return BlockStack(
        num_blocks=model.config.num_layers,
        embed=embed,
        block=run_block,
        head=head,
        block_params=block_params,
        outer=outer,
        join=join,
    )
