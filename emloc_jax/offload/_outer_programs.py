"""The compiled programs of what lies outside the blocks: embedding, head and loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.kernels import flatten_leaves, set_leaves
from emloc_jax.offload._alone_jit import AloneJit
from emloc_jax.offload._gradients import finish_gradients
from emloc_jax.offload._update_programs import UpdatePrograms

__all__ = ["HeadLoss", "OuterPrograms"]

# (outer parameters, x after the last block, batch) to loss sum and weight.
HeadLoss = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]


class OuterPrograms:
    """Embedding and head: what comes before the first block and after the last.

    Args:
      embed: `(outer, *inputs) -> (x, context)`.
      inputs: from a batch to the arguments of `embed`.
      head_loss: `(outer, x, batch) -> (sum, weight)`.
      updates: of the parameters outside the blocks; none of them is compressed.
      wire: dtype of gradients on the link.
    """

    def __init__(
        self,
        embed: Callable[..., tuple[Any, Any]],
        inputs: Callable[[Any], tuple[Any, ...]],
        head_loss: HeadLoss,
        updates: UpdatePrograms,
        *,
        wire: Any,
    ):
        self._embed, self._inputs, self._head_loss = embed, inputs, head_loss
        self._updates, self._plan, self._wire = updates, updates.plan, wire
        self.embed = AloneJit(lambda outer, batch: embed(outer, *inputs(batch)))
        self.head = AloneJit(self._head)
        self.embed_backward = AloneJit(
            self._embed_backward, static_argnames="last", donate_argnames="sums"
        )

    def _head(self, outer: Any, x: Any, batch: Any, scale: jax.Array) -> Any:
        """Loss sum, and `scale` times its gradients: of x, and of the trained leaves."""
        leaves = flatten_leaves(outer)
        dense = {path: leaves[path] for path in self._plan.dense}

        def objective(dense: Any, x: Any) -> tuple[jax.Array, jax.Array]:
            total, _ = self._head_loss(set_leaves(outer, dense), x, batch)
            return scale * total, total

        _, vjp, total = jax.vjp(objective, dense, x, has_aux=True)
        d_dense, dx = vjp(jnp.ones((), jnp.float32))
        return total, dx, {path: g.astype(jnp.float32) for path, g in d_dense.items()}

    def _embed_backward(self, outer: Any, batch: Any, dx: Any, sums: Any, last: bool) -> Any:
        """Adds the embedding's part to the gradients `sums`."""
        leaves = flatten_leaves(outer)
        dense = {path: leaves[path] for path in self._plan.dense}

        def run(dense: Any) -> Any:
            return self._embed(set_leaves(outer, dense), *self._inputs(batch))[0]

        _, vjp = jax.vjp(run, dense)
        (own,) = vjp(dx)
        sums = {path: g + own[path].astype(jnp.float32) for path, g in sums.items()}
        if not last:
            return sums
        return finish_gradients(sums, self._updates.sent, self._updates.kept, self._wire)
