"""One block in training: its parameters and all that belongs to them."""

import dataclasses
import threading
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.offload._block_programs import BlockPrograms
from emloc_jax.offload._step_flow import Held
from emloc_jax.offload._update_programs import UpdatePrograms

__all__ = ["BlockSlot"]


@dataclasses.dataclass
class BlockSlot:
    """Where a block's parameters are found, and when.

    Attributes:
      index: of the block; -1 for what lies outside the blocks.
      updates: compiled, shared by blocks of a kind; its plan says what is trained.
      programs: the passes, shared likewise; None outside the blocks.
      params: on the device, replaced by each update.
      pairs: path to projectors on the device.
      errors: path to the estimation error at the last check; no entry before the first on a
        gradient other than zero, infinite for a pair that could not be fitted.
      moments: path to Adam's moments on the host, of what is sent.
      device_moments: the same on the device, of what is not.
      extras: what rounding carries along, on the device.
      pending: futures of updates on their way, oldest first.
    """

    index: int
    updates: UpdatePrograms
    programs: BlockPrograms | None
    params: Any
    pairs: dict[str, Any]
    errors: dict[str, float]
    moments: dict[str, Any]
    device_moments: dict[str, Any]
    extras: dict[str, Any]
    pending: list[Future] = dataclasses.field(default_factory=list)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    @property
    def passes(self) -> BlockPrograms:
        """The passes through a block."""
        assert self.programs is not None
        return self.programs

    def ready(self, *, behind: int = 0) -> Any:
        """The parameters, once all updates but the latest `behind` are applied.

        Raises:
          Exception: what went wrong on a lane.
        """
        while len(self.pending) > behind:
            held = self.held()
            self.pending.pop(0)
            if held is not None:
                held.apply(held.update)
        return self.params

    def held(self) -> Held | None:
        """Waits for the oldest pending update: None once it is applied, unless it is delayed.

        Raises:
          Exception: what went wrong on a lane; it stays, for whoever asks again.
        """
        return self.pending[0].result() if self.pending else None

    def finished(self) -> Any:
        """The parameters with every update, also one that is to be applied later.

        In that case they are a copy: saving or evaluating must not change what follows.
        """
        held = self.held()
        if held is None:
            return self.params
        kept = jax.tree.map(jnp.copy, (self.params, self.extras))
        held.apply(held.update)  # consumes what it changes
        finished = self.params
        self.params, self.extras = kept
        return finished

    def update_on_device(self, gradients: Any, scale: Any, rate: Any, key: jax.Array) -> Any:
        """Adam on the device for the leaves that stay there; returns a token as `apply` does."""
        with self.lock:
            self.params, self.device_moments, self.extras, token = self.updates.update_on_device(
                self.params, gradients, self.device_moments, self.extras, key, rate, scale
            )
        return token

    def apply(self, update: Any, key: jax.Array) -> Any:
        """Applies an update that has come back; returns a token that is ready when it is done."""
        with self.lock:
            self.params, self.extras, token = self.updates.apply(
                self.params, self.pairs, update, self.extras, key
            )
        return token
