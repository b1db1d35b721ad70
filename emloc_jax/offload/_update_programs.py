"""The compiled programs that put updates into the parameters of a block."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.kernels import Layout, flatten_leaves, set_leaves
from emloc_jax.offload._adam import AdamOptions, SubspaceMoments
from emloc_jax.offload._adam_update import Update, adam_update
from emloc_jax.offload._alone_jit import AloneJit
from emloc_jax.offload._apply import apply_update
from emloc_jax.offload._plan import Plan
from emloc_jax.offload._rounding import Rounding, rounding_state
from emloc_jax.offload._step_scale import step_scale

__all__ = ["UpdatePrograms"]


class UpdatePrograms:
    """Updates of one kind of block, or of what lies outside the blocks.

    Args:
      plan: what is trained.
      host: whether Adam runs on the host; otherwise everything is updated on the device.
      adam: Adam's numbers, for leaves that are updated on the device.
      rounding: see `apply_update`.
      normalize: lengthen steps in subspaces, see `step_scale`.
    """

    def __init__(
        self, plan: Plan, *, host: bool, adam: AdamOptions, rounding: Rounding, normalize: bool
    ):
        self.plan, self._host = plan, host
        self._adam, self._normalize = adam, normalize
        self._rounding: Rounding = rounding
        self.apply = AloneJit(self._apply, donate_argnames=("params", "extras"))
        self.update_on_device = AloneJit(
            self._update_on_device, donate_argnames=("params", "moments", "extras")
        )

    @property
    def sent(self) -> list[str]:
        """Leaves whose gradients cross the link."""
        return [*self.plan.kernels, *self.plan.host] if self._host else []

    @property
    def kept(self) -> list[str]:
        """Leaves that are updated on the device."""
        return [path for path in (*self.plan.kernels, *self.plan.dense) if path not in self.sent]

    def _apply(
        self, params: Any, pairs: Mapping[str, Any], update: "Update", extras: Any, key: Any
    ) -> tuple[Any, Any, jax.Array]:
        """The block with an update of the host applied, and a token that is ready when it is."""
        changed, extras = self._changed(params, pairs, update.deltas, update.decay, extras, key)
        return set_leaves(params, changed), extras, jnp.zeros(())

    def _update_on_device(
        self,
        params: Any,
        gradients: dict[str, jax.Array],
        moments: dict[str, SubspaceMoments],
        extras: Any,
        key: Any,
        rate: jax.Array,
        scale: jax.Array,
    ) -> tuple[Any, Any, Any, jax.Array]:
        """The block, its moments and extras after Adam on the device, and a token."""
        update, moments = adam_update(
            gradients, moments, rate, scale, adam=self._adam, wire=jnp.float32
        )
        changed, extras = self._changed(params, {}, update.deltas, update.decay, extras, key)
        return set_leaves(params, changed), moments, extras, jnp.zeros(())

    def _changed(
        self, params: Any, pairs: Any, deltas: Any, decay: Any, extras: Any, key: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        leaves = flatten_leaves(params)
        changed, extras = {}, dict(extras)
        for number, (path, delta) in enumerate(sorted(deltas.items())):
            leaf, spec = leaves[path], self.plan.kernels.get(path)
            p, q = pairs.get(path, (None, None))
            if spec and self._normalize:
                delta = delta.astype(jnp.float32) * step_scale((spec.d_in, spec.d_out), delta.shape)
            new, extra = apply_update(
                leaf if spec else as_row(leaf),
                delta if spec else as_row(delta),
                p,
                q,
                decay=decay if path in self.plan.decaying else 0.0,
                layout=spec.layout if spec else Layout(),
                rounding=self._rounding,
                extra=extras.get(path),
                key=jax.random.fold_in(key, number),
            )
            changed[path] = new.reshape(leaf.shape)
            if extra is not None:
                extras[path] = extra
        return changed, extras

    def rounding_states(self, params: Any) -> dict[str, jax.Array]:
        """What rounding carries along for each trained leaf, before the first step."""
        leaves = flatten_leaves(params)
        states = {}
        for path in (*self.sent, *self.kept):
            leaf = leaves[path]
            kernel = path in self.plan.kernels
            states[path] = rounding_state(leaf if kernel else as_row(leaf), self._rounding)
        return {path: state for path, state in states.items() if state is not None}


def as_row(array: jax.Array) -> jax.Array:
    """A leaf of any shape as a matrix of one row, which is how updates see it."""
    return array.reshape(1, -1)
