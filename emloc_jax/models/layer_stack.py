"""Blocks in a row, unrolled or scanned: one way to run either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from emloc_jax.errors import ConfigError

__all__ = ["Remat", "UnrolledLayers", "new_layers", "run_layers"]

Remat = bool | Literal["none", "block", "dots"]


class UnrolledLayers(nn.Module):
    """Blocks named '0', '1', …, so that parameter paths read ``layers/0/…``.

    Attributes:
        block: makes a block, given its ``name``.
        num_layers: L.
    """

    block: Callable[..., nn.Module]
    num_layers: int

    @nn.compact
    def __call__(self, run: Callable[[Any, Any, int], Any], carry: Any) -> Any:
        """Passes ``carry`` through ``run(block, carry, index)`` of every block in turn."""
        for index in range(self.num_layers):
            carry = run(self.block(name=str(index)), carry, index)
        return carry


def new_layers(block: Callable[..., nn.Module], num_layers: int, scan: bool) -> nn.Module:
    """What a model keeps under the name ``layers``: one block if scanned, else all of them.

    Args:
        block: makes a block, given its ``name``.
        num_layers: L.
        scan: the layers are scanned.

    Returns:
        A module for ``run_layers``.
    """
    return block() if scan else UnrolledLayers(block, num_layers)


def run_layers(
    layers: nn.Module,
    run: Callable[[Any, Any, Any], Any],
    carry: Any,
    *,
    num_layers: int,
    scan: bool,
    remat: Remat = False,
) -> Any:
    """Passes ``carry`` through ``run(block, carry, index)`` of every block in turn.

    Args:
        layers: from ``new_layers``, with the same ``num_layers`` and ``scan``.
        run: applies a block.
        carry: any pytree; the residual stream.
        num_layers: L.
        scan: the layers are scanned.
        remat: what the backward pass finds of each block: all its activations (``'none'``, False),
            its input only (``'block'``, True), or also the results of its matrix products, so that
            only what is cheap is computed again (``'dots'``).

    Returns:
        The last carry.

    Raises:
        ConfigError: an unknown ``remat``.
    """
    if remat not in (False, True, "none", "block", "dots"):
        raise ConfigError(f"remat is {remat!r}; give none, block or dots.")
    if remat not in (False, "none"):
        # A scanned body is its own computation, so nothing can be merged across the barrier.
        # Products with a batch dimension are attention's scores, which take far more memory.
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if remat == "dots" else None
        run = nn.remat(run, prevent_cse=not scan, policy=policy)
    if not scan:
        return layers(run, carry)
    scanned = nn.scan(
        lambda block, carry, layer: (run(block, carry, layer), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=num_layers,
    )
    return scanned(layers, carry, jnp.arange(num_layers))[0]
