"""One block with taps: its passes also give the second moments of its kernels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.emulator import Sums, Taps, any_scalar

__all__ = ["tapped_backward", "tapped_forward"]

Block = Callable[[Any, Any, Any], Any]


def tapped_forward(block: Block, taps: Taps) -> Callable[..., tuple[Any, Sums]]:
    """A compiled `(params, sums, x, context, tokens) -> (y, sums)`; the old sums are donated.

    Args:
      block: `(params, x, context) -> y`, of an intercepted model.
      taps: on the block's own kernels, without gradients.
    """

    def forward(params: Any, sums: Sums, x: Any, context: Any, tokens: Any) -> tuple[Any, Sums]:
        def run(phantoms: Sums) -> tuple[Any, Any]:
            y = block(taps.attach(params, phantoms, tokens), x, context)
            return any_scalar(y), y

        cotangents, y = jax.grad(run, has_aux=True)(jax.tree.map(jnp.zeros_like, sums))
        return y, jax.tree.map(jnp.add, sums, cotangents)

    return jax.jit(forward, donate_argnums=1)


def tapped_backward(block: Block, taps: Taps) -> Callable[..., tuple[Any, Sums]]:
    """A compiled `(params, sums, x, context, tokens, dy) -> (dx, sums)`; the sums are donated.

    The forward pass is computed again from the block's input.

    Args:
      block: see `tapped_forward`.
      taps: on the block's own kernels, with gradients.
    """

    def backward(
        params: Any, sums: Sums, x: Any, context: Any, tokens: Any, dy: Any
    ) -> tuple[Any, Sums]:
        def run(phantoms: Sums, x: Any) -> Any:
            return block(taps.attach(params, phantoms, tokens), x, context)

        _, vjp = jax.vjp(run, jax.tree.map(jnp.zeros_like, sums), x)
        cotangents, dx = vjp(dy)
        return dx, jax.tree.map(jnp.add, sums, cotangents)

    return jax.jit(backward, donate_argnums=1)
