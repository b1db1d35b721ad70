"""What a streamed step takes, from its programs on shapes alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.adapters import Adapter
from emloc_jax.streaming._lora_layers import AdapterLayers
from emloc_jax.streaming._lora_step import StreamedLoraStep, micro_batches
from emloc_jax.training import init_state

__all__ = ["StreamedLoraMemory", "streamed_lora_programs"]


@dataclasses.dataclass(frozen=True)
class StreamedLoraMemory:
    """The programs of a streamed step, and what lies on the device while they run.

    Attributes:
      lowered: {name: lowered program} of embed, forward, backward, head, write and update; the
        programs of blocks once per kind, as `forward` and `forward 3`, say, for another kind whose
        first block is 3.
      resident: {what: bytes} on the device throughout, counted as if all of it were there at the
        same time: outer parameters, two blocks, adapters and optimizer state, gradients,
        activations of the micro-batches, batch and context, and the blocks' inputs (those of two
        blocks if they wait elsewhere).
      host: bytes of blocks' inputs that wait on the host.
    """

    lowered: dict[str, Any]
    resident: dict[str, int]
    host: int

    def peak(self) -> int:
        """Bytes of the device at most: what is resident, and the largest program's own."""
        return sum(self.resident.values()) + max(map(_own_bytes, self.lowered.values()))


def streamed_lora_programs(
    step: StreamedLoraStep, params: Any, adapters: Mapping[str, Adapter], batch: Mapping[str, Any]
) -> StreamedLoraMemory:
    """Lowers each program of `step` once per kind of block; nothing is allocated.

    Args:
      step: the step.
      params: shapes of all the original's parameters, in the layout of the step's stack.
      adapters: adapters, or their shapes.
      batch: a batch, or its shapes.
    """
    shapes = jax.tree.map(_shape, (params, dict(adapters), dict(batch)))
    params, adapters, batch = shapes
    stack, programs = step.stack, step.programs
    layers = AdapterLayers(adapters, stack.name, stack.num_blocks)
    outer = stack.outer(params)
    micro = jax.eval_shape(lambda batch: micro_batches(batch, step.accumulation), batch)
    x, context = jax.eval_shape(programs.embed, outer, micro[0])
    state = jax.eval_shape(lambda adapters: init_state(adapters, step.tx), adapters)
    keys = jax.eval_shape(step.keys, adapters, state.rng, state.step)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    sums = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), adapters)

    lowered: dict[str, Any] = {
        "embed": programs.embed.lower(outer, micro[0]),
        "head": programs.head.lower(outer, x, micro[0]),
        "update": step.update.lower(state, scalar, scalar, sums),
    }
    kinds: dict[Any, int] = {}
    largest = 0
    for index in range(stack.num_blocks):
        block = jax.eval_shape(
            lambda params, index=index: stack.block_params(params, index), params
        )
        own = layers.shapes(adapters, index)
        kind = str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), (block, own)))
        largest = max(largest, _bytes(block))
        if kind in kinds:
            continue
        kinds[kind] = index
        own_keys = layers.shapes(keys[0], index) if keys[0] else None
        ending = f" {index}" if len(kinds) > 1 else ""
        arguments = block, own, own_keys, x, context
        lowered[f"forward{ending}"] = programs.forward.lower(*arguments)
        lowered[f"backward{ending}"] = programs.backward.lower(*arguments, x)
    count = step.accumulation
    inputs = count * _bytes(x) * stack.num_blocks
    on_device = inputs if step.inputs_in == "device" else min(inputs, 2 * count * _bytes(x))
    resident = {
        "outer parameters": _bytes(outer),
        "blocks": min(2, stack.num_blocks) * largest,
        "adapters and optimizer": _bytes(state),
        "gradients": _bytes(sums),
        # What a block gave beside what the next one gives, and one block's part of the adapters.
        "activations": 2 * count * _bytes(x),
        "block's adapters": 2 * max(_bytes(layers.shapes(adapters, i)) for i in kinds.values()),
        "batch and context": _bytes(batch) + count * _bytes(context) + count * _bytes(keys[0]),
        "blocks' inputs": on_device,
    }
    return StreamedLoraMemory(lowered, resident, 0 if step.inputs_in == "device" else inputs)


def _own_bytes(lowered: Any) -> int:
    """Outputs and temporaries of a program, whose arguments count as resident."""
    analysis = lowered.compile().memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(outputs + analysis.temp_size_in_bytes)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _bytes(tree: Any) -> int:
    """Bytes of arrays or shapes; a random key counts as two words."""
    return sum(
        leaf.size * (8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )
