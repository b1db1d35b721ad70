"""Deterministic, resumable batches of latents with noise and times."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from emloc_jax.errors import ConfigError, ResumeError
from emloc_jax.training._flow_times import TimeSampling, draw_times
from emloc_jax.training._latents import LatentData

__all__ = ["FlowBatches"]


@dataclasses.dataclass(frozen=True)
class FlowBatches:
    """A stream of batches for `make_flow_loss` that can be walked again and again.

    Batch number n is a function of the data, the settings and n, so a stream can be gone on with
    from anywhere. Each pass over the pictures has an order, times and noise of its own. With
    `sampling="stratified"` the times of a pass are spread evenly over (0, 1), for calibration and
    evaluation.

    Attributes:
        data: the pictures.
        batch_size: pictures per batch.
        seed: of order, times and noise.
        sampling: see `draw_times`.
        shift: see `shift_times`; `resolution_shift(T)` as FLUX.1-dev has it.
        guidance: the scale that a model with guidance embeddings is told; None: there is none.
        epochs: passes over the pictures; None repeats for ever. The last batch of a pass is filled
            up with pictures of weight 0, so that shapes stay.

    Raises:
        ConfigError: an impossible option.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> data = LatentData(rng.normal(size=(3, 4, 8)), rng.normal(size=(3, 5, 6)),
        ...                   rng.normal(size=(3, 7)), np.zeros((4, 3)))
        >>> first, last = FlowBatches(data, batch_size=2, sampling="stratified", epochs=1)
        >>> last["noise"].shape, last["weights"].tolist()
        ((2, 4, 8), [1.0, 0.0])
    """

    data: LatentData
    batch_size: int
    seed: int = 0
    sampling: TimeSampling = "logit_normal"
    shift: float = 1.0
    guidance: float | None = None
    epochs: int | None = None

    def __post_init__(self):
        if self.batch_size < 1 or (self.epochs is not None and self.epochs < 1):
            raise ConfigError(
                f"batch_size is {self.batch_size} and epochs {self.epochs}; give at least 1."
            )
        draw_times(1, seed=0, sampling=self.sampling, shift=self.shift)  # refuses now, not later

    @property
    def per_epoch(self) -> int:
        """Batches of one pass."""
        return -(-len(self.data) // self.batch_size)

    def __len__(self) -> int:
        """Batches in all, of a finite stream."""
        if self.epochs is None:
            raise TypeError("an endless stream has no length")
        return self.epochs * self.per_epoch

    def __iter__(self) -> FlowIterator:
        return FlowIterator(self)

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """Batch `number`, from 0."""
        data, count = self.data, len(self.data)
        epoch, part = divmod(number, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(count)
        times = draw_times(
            count, seed=[self.seed, epoch, 1], sampling=self.sampling, shift=self.shift
        )
        places = np.arange(part * self.batch_size, (part + 1) * self.batch_size)
        chosen, weights = order[places % count], (places < count).astype(np.float32)
        shape = (self.batch_size, *data.latents.shape[1:])
        noise = np.random.default_rng([self.seed, number, 2]).standard_normal(shape, np.float32)
        batch = {
            "latents": data.latents[chosen],
            "noise": noise,
            "timesteps": times[places % count],
            "prompt_embeds": data.prompt_embeds[chosen],
            "pooled_prompt_embeds": data.pooled_prompt_embeds[chosen],
            "image_ids": np.repeat(data.image_ids[None], self.batch_size, axis=0),
            "weights": weights,
        }
        if self.guidance is not None:
            batch["guidance"] = np.full(self.batch_size, self.guidance, np.float32)
        return batch

    @property
    def fingerprint(self) -> str:
        """Of the data and the settings."""
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "data"
        }
        digest = hashlib.sha256(json.dumps(settings).encode())
        for field in ("latents", "prompt_embeds", "pooled_prompt_embeds", "image_ids"):
            digest.update(np.ascontiguousarray(getattr(self.data, field)).tobytes())
        return digest.hexdigest()[:16]


class FlowIterator(Iterator[dict[str, np.ndarray]]):
    """An iterator whose position can be saved; an equal stream continues from it bit for bit."""

    def __init__(self, batches: FlowBatches):
        self._batches = batches
        self._number = 0

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches.epochs is not None and self._number >= len(self._batches):
            raise StopIteration
        self._number += 1
        return self._batches.batch(self._number - 1)

    def get_state(self) -> dict[str, Any]:
        """The position, as a dict that JSON can hold."""
        return {"number": self._number, "fingerprint": self._batches.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position of an equal stream.

        Raises:
            ResumeError: the state was taken from other data or other settings.
        """
        if state.get("fingerprint") != self._batches.fingerprint:
            raise ResumeError(
                "the data position was saved on other latents or other batch settings; resume "
                "with those of the first run, or start a new run."
            )
        self._number = int(state["number"])
