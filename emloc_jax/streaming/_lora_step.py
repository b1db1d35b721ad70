"""LoRA on a model that is never whole on the device: exact, and a step of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emloc_jax.adapters import Adapter, dropout_keys
from emloc_jax.errors import ConfigError
from emloc_jax.models import BlockSource, BlockStack
from emloc_jax.streaming._block_inputs import BlockInputs, Place, check_place
from emloc_jax.streaming._lora_layers import AdapterLayers
from emloc_jax.streaming._lora_programs import HeadLoss, LoraPrograms, token_inputs
from emloc_jax.streaming._walk import walk
from emloc_jax.training import TrainState, cut_batch, make_update

__all__ = ["StreamedLoraStep", "micro_batches"]


class StreamedLoraStep:
    """`step(state, source, batch) -> (state, metrics)`: one step of LoRA, walking the blocks.

    For `train(step, state, batches, frozen=source)`, with adapters as the state's trainables. The
    maths is that of `make_train_step` with `combine=attach`: exact accumulation, clipping, refusal
    of non-finite numbers, the same key for every kernel's dropout. With scanned layers the results
    are its bits (tested on CPU).

    A step walks the blocks up and down again. All micro-batches pass a block before the next one
    comes, so a block crosses the link 2 - 1/L times per step, however many micro-batches there are;
    it is recomputed in the backward pass from its input, which is all that is kept of the forward
    pass. On the device lie at most two blocks, the parameters outside the blocks, adapters with
    their gradients and optimizer state, and the inputs of the blocks, unless they wait elsewhere.

    Args:
      stack: of an intercepted model (`block_stack(model, wrap=intercept)`).
      head_loss: as by `make_head_loss`.
      tx: the optimizer.
      inputs: from a batch to the arguments of the stack's `embed`.
      accumulation: micro-batches per step.
      clip: largest global gradient norm, or None.
      schedule: learning rates to report; those applied are `tx`'s own.
      dropout: rate of dropout on the adapters' input, in [0, 1).
      inputs_in: where the blocks' inputs wait for the backward pass: device, host or pinned_host.

    Raises:
      ConfigError: an impossible option; on a call: a batch that cannot be cut evenly, an adapter
        outside the blocks, or a source with another number of blocks.
      AdapterMismatchError: on a call: adapters of another model.

    Example:
      >>> from emloc_jax.adapters import init_adapters
      >>> from emloc_jax.kernels import find_kernels, intercept
      >>> from emloc_jax.models import Decoder, DecoderConfig, MemoryBlocks, block_stack
      >>> from emloc_jax.training import init_state, make_head_loss
      >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
      ...                        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
      >>> model, tokens = Decoder(config, scan_layers=True), jnp.ones((2, 5), jnp.int32)
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> kernels = find_kernels(model.apply, params, tokens)
      >>> adapters = init_adapters(jax.random.key(1), kernels, where="layers/.*", rank=2, alpha=4)
      >>> stack, tx = block_stack(model, wrap=intercept), optax.adam(1e-2)
      >>> step = StreamedLoraStep(stack, make_head_loss(intercept(model.apply)), tx)
      >>> batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((2, 5))}
      >>> state, blocks = init_state(adapters, tx), MemoryBlocks(stack, params)
      >>> state, first = step(state, blocks, batch)
      >>> state, second = step(state, blocks, batch)
      >>> bool(second["loss"] < first["loss"])
      True
    """

    def __init__(
        self,
        stack: BlockStack,
        head_loss: HeadLoss,
        tx: optax.GradientTransformation,
        *,
        inputs: Callable[[Any], tuple[Any, ...]] = token_inputs,
        accumulation: int = 1,
        clip: float | None = 1.0,
        schedule: optax.Schedule | None = None,
        dropout: float = 0.0,
        inputs_in: Place = "device",
    ):
        if accumulation < 1:
            raise ConfigError(f"accumulation is {accumulation}; it must be at least 1.")
        check_place(inputs_in)
        self.stack, self.tx, self.accumulation = stack, tx, accumulation
        self.inputs_in: Place = inputs_in
        self.programs = LoraPrograms(stack, head_loss, inputs=inputs, dropout=dropout)
        self.update = jax.jit(
            make_update(tx, clip=clip, schedule=schedule), donate_argnames="state"
        )
        self._dropout = dropout
        self.keys = jax.jit(self._micro_keys)
        self._layers: AdapterLayers | None = None
        self._outer: tuple[BlockSource, Any] | None = None

    def __call__(
        self, state: TrainState, frozen: BlockSource, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step; consumes `state`.

        Args:
          state: its trainables are adapters, as by `init_adapters`.
          frozen: the original's parameters.
          batch: as `make_train_step` takes it.
        """
        total, weight, gradient = self.gradient_sums(state, frozen, batch)
        return self.update(state, total, weight, gradient)

    def gradient_sums(
        self, state: TrainState, source: BlockSource, batch: Mapping[str, Any]
    ) -> tuple[jax.Array, jax.Array, dict[str, Adapter]]:
        """Loss sum, weight sum and gradient sums of a step, fp32."""
        count, adapters = self.stack.num_blocks, state.trainables
        if source.num_blocks != count:
            raise ConfigError(
                f"The model has {count} blocks, but the source of its parameters "
                f"{source.num_blocks}. Use a source of this model."
            )
        if self._layers is None:
            self._layers = AdapterLayers(adapters, self.stack.name, count)
        layers, programs = self._layers, self.programs
        micro = micro_batches(batch, self.accumulation)
        outer = self.outer(source)
        keys = self.keys(adapters, state.rng, state.step)
        add = self.accumulation > 1
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), dict(adapters))

        embedded = [programs.embed(outer, part) for part in micro]
        xs, contexts = [x for x, _ in embedded], [context for _, context in embedded]
        del embedded
        kept, total, weight, dxs = BlockInputs(self.inputs_in), None, None, []
        up = count
        for index, params in walk(source, [*range(count), *reversed(range(count - 1))]):
            own = layers.take(adapters, index)
            own_keys = [layers.take(key, index) if key else None for key in keys]
            if up:
                new = [
                    programs.forward(params, own, key, x, context)
                    for key, x, context in zip(own_keys, xs, contexts, strict=True)
                ]
                kept.keep(index, xs)
                xs, up = new, up - 1
                del new
                # The next block is on its way; another may leave only once this one is done with.
                jax.block_until_ready(xs)
            if not up:
                if index == count - 1:
                    total, weight, dxs = self._heads(outer, xs, micro)
                    del xs
                inputs = kept.take(index)
                if index > 0:
                    kept.fetch(index - 1)
                for m, x in enumerate(inputs):
                    arguments = own, own_keys[m], x, contexts[m], dxs[m]
                    dxs[m], gradient = programs.backward(params, *arguments)
                    layers.put(sums, index, gradient, add=add)
                    del arguments, gradient, x
                jax.block_until_ready(dxs)
                del inputs
            del params, own, own_keys
        assert total is not None and weight is not None
        return total, weight, sums

    def outer(self, source: BlockSource) -> Any:
        """The parameters outside the blocks on the device; they stay there for the next call."""
        if self._outer is None or self._outer[0] is not source:
            self._outer = None  # the old ones go before the new ones come
            self._outer = source, jax.device_put(source.outer())
        return self._outer[1]

    def release(self) -> None:
        """Lets go of the parameters outside the blocks; the next step reads them again."""
        self._outer = None

    def _heads(self, outer: Any, xs: list[Any], micro: list[Any]) -> tuple[Any, Any, list[Any]]:
        """Loss and weight sums, and the gradients of the last block's outputs."""
        results = []
        for m, part in enumerate(micro):
            results.append(self.programs.head(outer, xs[m], part))
            xs[m] = None
        if self.accumulation == 1:
            return results[0][0], results[0][1], [results[0][2]]
        total = weight = jnp.zeros((), jnp.float32)
        for own_total, own_weight, _ in results:
            total, weight = total + own_total, weight + own_weight
        return total, weight, [dx for _, _, dx in results]

    def _micro_keys(self, adapters: Any, rng: jax.Array, step: jax.Array) -> list[Any]:
        """The keys of dropout for each micro-batch, per kernel: those of `make_train_step`."""
        if self._dropout == 0:
            return [None] * self.accumulation
        key = jax.random.fold_in(rng, step)
        return [
            dropout_keys(jax.random.fold_in(key, m), adapters) for m in range(self.accumulation)
        ]


def micro_batches(batch: Mapping[str, Any], accumulation: int) -> list[dict[str, Any]]:
    """The parts of a batch that `make_train_step` would scan over."""
    cut = {name: cut_batch(array, accumulation) for name, array in batch.items()}
    return [{name: array[m] for name, array in cut.items()} for m in range(accumulation)]
