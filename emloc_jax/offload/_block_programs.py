"""The compiled passes through a block: one of each for all blocks of a kind."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.kernels import KernelSpec, SubspaceKernel, flatten_leaves, set_leaves
from emloc_jax.offload._alone_jit import AloneJit
from emloc_jax.offload._gradients import finish_gradients
from emloc_jax.offload._update_programs import UpdatePrograms

__all__ = ["BlockPrograms", "core_shape"]


class BlockPrograms:
    """Forward pass, backward pass and full gradients of one kind of block.

    Args:
      block: `(params, x, context) -> x`, of an intercepted model.
      updates: of the same kind; says what is trained, and where its gradients go.
      wire: dtype of gradients on the link.
    """

    def __init__(
        self, block: Callable[[Any, Any, Any], Any], updates: UpdatePrograms, *, wire: Any
    ):
        self._block, self._updates, self._plan = block, updates, updates.plan
        self._wire = wire
        self.forward = AloneJit(block)
        self.backward = AloneJit(self._backward, static_argnames="last", donate_argnames="sums")
        self.full_gradients = AloneJit(self._full_gradients)

    def _vjp(self, params: Any, pairs: Mapping[str, Any], x: Any, context: Any, dy: Any) -> Any:
        plan, leaves = self._plan, flatten_leaves(params)
        dense = {path: leaves[path] for path in plan.dense}

        def run(cores: Any, dense: Any, x: Any) -> Any:
            boxes = {}
            for path, spec in plan.kernels.items():
                p, q = pairs.get(path, (None, None))
                boxes[path] = SubspaceKernel(leaves[path], p, cores[path], q, layout=spec.layout)
            return self._block(set_leaves(params, boxes | dense), x, context)

        cores = {
            path: jnp.zeros(core_shape(spec, pairs.get(path, (None, None))), jnp.float32)
            for path, spec in plan.kernels.items()
        }
        _, vjp = jax.vjp(run, cores, dense, x)
        d_cores, d_dense, dx = vjp(dy)
        d_dense = {path: g.astype(jnp.float32) for path, g in d_dense.items()}
        return dx, d_cores | d_dense

    def _backward(
        self,
        params: Any,
        pairs: Mapping[str, Any],
        x: Any,
        context: Any,
        dy: Any,
        sums: dict[str, jax.Array] | None,
        last: bool,
    ) -> tuple[Any, Any]:
        """The block's input gradient and its parameter gradients, added to `sums`.

        The forward pass is computed again from the block's input. With `last` the sums are done:
        they come back as `Gradients`.
        """
        dx, gradients = self._vjp(params, pairs, x, context, dy)
        if sums is not None:
            gradients = jax.tree.map(jnp.add, sums, gradients)
        if not last:
            return dx, gradients
        return dx, finish_gradients(gradients, self._updates.sent, self._updates.kept, self._wire)

    def _full_gradients(self, params: Any, x: Any, context: Any, dy: Any) -> tuple[Any, Any]:
        """The block's input gradient and the `(d_in, d_out)` fp32 gradients of its kernels."""
        dx, gradients = self._vjp(params, {}, x, context, dy)
        return dx, {path: gradients[path] for path in self._plan.kernels}


def core_shape(spec: KernelSpec, pair: Any) -> tuple[int, int]:
    """Shape of a kernel's gradient as Adam sees it."""
    p, q = pair
    return (spec.d_in if p is None else p.size, spec.d_out if q is None else q.size)
