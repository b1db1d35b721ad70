"""A pipelined trainer as a step of the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.offload import PipelinedTrainer
from emloc_jax.training._state import TrainState

__all__ = ["PipelinedStep"]


class PipelinedStep:
    """`step(state, frozen, batch) -> (state, metrics)` around a `PipelinedTrainer`.

    The trainer holds the parameters, so the state that goes round is a token; `snapshot` drains the
    trainer and gives the state to save, and a saved one that comes in is loaded.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: PipelinedTrainer):
        self.trainer = trainer

    def initial(self) -> TrainState:
        """The state before the first step, for `train`.

        It holds shapes instead of arrays, placed on the host: a checkpoint is restored there, so
        that the device never holds the parameters twice.
        """
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu),
            self.trainer.state(),
        )
        return dataclasses.replace(self._token(), trainables=shapes)

    def __call__(
        self, state: TrainState, frozen: Any, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step."""
        del frozen
        self._take(state)
        metrics = self.trainer.step(batch)
        return self._token(), {name: np.asarray(value) for name, value in metrics.items()}

    def snapshot(self, state: TrainState) -> TrainState:
        """The same state with all that a resumption needs; the next step consumes it."""
        self._take(state)
        return dataclasses.replace(state, trainables=self.trainer.state())

    def _take(self, state: TrainState) -> None:
        """Loads a saved state, unless it is where the trainer is."""
        if state.trainables is not None and int(state.step) != self.trainer.steps:
            self.trainer.load(state.trainables)

    def _token(self) -> TrainState:
        return TrainState(
            step=jnp.int32(self.trainer.steps),
            skipped=jnp.int32(self.trainer.skipped),
            trainables=None,
            opt_state=(),
            rng=jax.random.key(self.trainer.options.seed),
        )
