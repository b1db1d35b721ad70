"""Blocks in a row, unrolled or scanned: one way to run either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

__all__ = ["UnrolledLayers", "new_layers", "run_layers"]


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
    remat: bool = False,
) -> Any:
    """Passes ``carry`` through ``run(block, carry, index)`` of every block in turn.

    Args:
        layers: from ``new_layers``, with the same ``num_layers`` and ``scan``.
        run: applies a block.
        carry: any pytree; the residual stream.
        num_layers: L.
        scan: the layers are scanned.
        remat: recompute each block in the backward pass.

    Returns:
        The last carry.
    """
    if remat:
        # A scanned body is its own computation, so nothing can be merged across the barrier.
        run = nn.remat(run, prevent_cse=not scan)
    if not scan:
        return layers(run, carry)
    scanned = nn.scan(
        lambda block, carry, layer: (run(block, carry, layer), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=num_layers,
    )
    return scanned(layers, carry, jnp.arange(num_layers))[0]
