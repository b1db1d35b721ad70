"""The passes of all calibration batches through a model, one block at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.emulator import SecondMoment, Sums, Taps
from emloc_jax.models import BlockSource
from emloc_jax.streaming._model import StreamedModel
from emloc_jax.streaming._spill import Spill
from emloc_jax.streaming._tapped_block import tapped_backward, tapped_forward
from emloc_jax.streaming._walk import walk

__all__ = ["Passes"]

Finish = Callable[[int, Any, dict[str, SecondMoment] | None], None]


class Passes:
    """Calibration block by block, from wherever an earlier process left it.

    What a block needs to be measured lies in `spill`: its inputs `("x", block, batch)`, and for
    gradients those of the loss at its outputs, `("g", block, batch)`. What the next block needs is
    durable before a block counts as finished, and what a block needed goes after that.

    Args:
      model: compiled parts.
      source: of the parameters.
      batches: with `tokens`, `positions` and `segments`; segment 0 is padding, which is not
        counted.
      taps: `block -> Taps`, or None where nothing is measured.
      spill: keeps the activations.
      finish: called with a block, its parameters on the device and its second moments.
      on_step: called after each block of each pass, for a progress bar.
    """

    def __init__(
        self,
        model: StreamedModel,
        source: BlockSource,
        batches: Sequence[Mapping[str, Any]],
        taps: Callable[[int], Taps | None],
        spill: Spill,
        finish: Finish,
        on_step: Callable[[], None] = lambda: None,
    ):
        self._model, self._source, self._batches = model, source, batches
        self._taps, self._spill = taps, spill
        self._finish, self._on_step = finish, on_step
        self._outer: Any = None
        self._programs: dict[Any, Any] = {}

    def plain(self, blocks: Sequence[int]) -> None:
        """Visits blocks without data."""
        for index, params in walk(self._source, blocks):
            self._finish(index, params, None)
            self._on_step()

    def one_sided(self, first: int) -> None:
        """Measures the inputs of block `first` and all after it, in one walk."""
        last = self._source.num_blocks
        self._forward(first, keep=False)
        for index, params in walk(self._source, range(first, last)):
            taps = self._taps(index)
            sums = {} if taps is None else taps.zeros()
            for number, batch in enumerate(self._batches):
                x, context = self._spill.get(("x", index, number)), self._model.context(batch)
                if taps is None:
                    y = self._model.block(params, x, context)
                else:
                    step = self._program(tapped_forward, taps)
                    y, sums = step(params, sums, x, context, _tokens(batch))
                if index + 1 < last:
                    self._spill.put(("x", index + 1, number), y, durable=True)
            self._measured(index, params, taps, sums)
            self._drop("x", index)

    def two_sided(self, last: int) -> None:
        """Measures inputs and gradients of block `last` and all before it, the deepest first."""
        end = self._source.num_blocks - 1
        self._forward(last, keep=True)
        if not all(self._spill.has(("g", last, n)) for n in range(len(self._batches))):
            assert last == end, "a finished block leaves the gradients that the next one needs"
            self._head(end)
        for index, params in walk(self._source, range(last, -1, -1)):
            taps = self._taps(index)
            sums = {} if taps is None else taps.zeros()
            for number, batch in enumerate(self._batches):
                x, dy = self._spill.get(("x", index, number)), self._spill.get(("g", index, number))
                context = self._model.context(batch)
                if taps is None:
                    dx = self._program(_plain_backward, None)(params, x, context, dy)
                else:
                    step = self._program(tapped_backward, taps)
                    dx, sums = step(params, sums, x, context, _tokens(batch), dy)
                if index > 0:
                    self._spill.put(("g", index - 1, number), dx, durable=True)
            self._measured(index, params, taps, sums)
            self._drop("x", index)
            self._drop("g", index)

    def _measured(self, index: int, params: Any, taps: Taps | None, sums: Sums) -> None:
        moments = None
        if taps is not None:
            taps.check(sums, len(self._batches), within=f"layers/{index}/")
            moments = taps.moments(sums)
        self._finish(index, params, moments)
        self._on_step()

    def _forward(self, last: int, *, keep: bool) -> None:
        """Makes the inputs of block `last`, and of those before it if they are kept."""
        numbers = range(len(self._batches))
        first = last
        while first > 0 and (keep or not self._all("x", first)):
            first -= 1
        if first == 0:
            for number in numbers:
                if not self._spill.has(("x", 0, number)):
                    x = self._model.embed(self._outside(), self._batches[number])
                    self._spill.put(("x", 0, number), x)
        todo = [i for i in range(first, last) if not self._all("x", i + 1)]
        for index, params in walk(self._source, todo):
            for number in numbers:
                if not self._spill.has(("x", index + 1, number)):
                    x, context = self._spill.get(("x", index, number)), None
                    context = self._model.context(self._batches[number])
                    y = self._model.block(params, x, context)
                    self._spill.put(("x", index + 1, number), y)
            if not keep:
                self._drop("x", index)
            self._on_step()

    def _head(self, end: int) -> None:
        """The gradients of the loss at the last block's outputs."""
        for index, params in walk(self._source, [end]):
            for number, batch in enumerate(self._batches):
                x, context = self._spill.get(("x", index, number)), self._model.context(batch)
                y = self._model.block(params, x, context)
                g = self._model.head_gradient(self._outside(), y, batch)
                self._spill.put(("g", index, number), g, durable=True)
        self._on_step()
        self._outer = None

    def _outside(self) -> Any:
        if self._outer is None:
            self._outer = jax.device_put(self._source.outer())
        return self._outer

    def _program(self, make: Callable[..., Any], taps: Taps | None) -> Any:
        key = (make, None if taps is None else tuple(taps.specs.values()))
        if key not in self._programs:
            self._programs[key] = make(self._model.stack.block, taps)
        return self._programs[key]

    def _all(self, what: str, index: int) -> bool:
        return all(self._spill.has((what, index, n)) for n in range(len(self._batches)))

    def _drop(self, what: str, index: int) -> None:
        for number in range(len(self._batches)):
            self._spill.drop((what, index, number))


def _tokens(batch: Mapping[str, Any]) -> jax.Array:
    """Which positions hold real tokens."""
    return jnp.asarray(batch["segments"] > 0)


def _plain_backward(block: Any, taps: None) -> Any:
    del taps

    def backward(params: Any, x: Any, context: Any, dy: Any) -> Any:
        return jax.vjp(lambda x: block(params, x, context), x)[1](dy)[0]

    return jax.jit(backward)
