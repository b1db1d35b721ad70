"""What a streamed emulation runs, lowered on shapes: the passes of `Passes` and the factoring."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax._program import Program, tree_bytes
from emloc_jax._program_memory import ProgramMemory
from emloc_jax.emulator import SecondMoment, Taps, error_squares, factorize
from emloc_jax.kernels import KernelSpec
from emloc_jax.streaming._model import StreamedModel
from emloc_jax.streaming._shapes import BlockShapes
from emloc_jax.streaming._tapped_block import tapped_backward, tapped_forward

__all__ = ["calibration_programs", "factor_bytes", "factorization_programs"]


def calibration_programs(
    model: StreamedModel, shapes: BlockShapes, taps: Taps
) -> dict[str, Program]:
    """The programs of `Passes.two_sided` if the taps measure gradients, else of `one_sided`.

    Args:
      model: its parts.
      shapes: of the model and a calibration batch.
      taps: on the kernels of a block.

    Returns:
      By name, with what the pass holds on the device besides the program's arguments: the next
      block, what the batch before gave, and in every pass but the backward one the parameters
      outside the blocks; and on the host, the block that is being read.
    """
    block, x, context = shapes.block, shapes.x, shapes.context
    tokens = jax.ShapeDtypeStruct(shapes.batch["segments"].shape, bool)
    sums = jax.eval_shape(taps.zeros)
    outside = {"outer parameters": tree_bytes(shapes.outer)}
    walked = {"next block": shapes.next_block, "activations": tree_bytes(x)}
    read = {"block as read": shapes.read}
    of_block = {"parameters": tree_bytes(block)}
    tapped = of_block | {"moments": tree_bytes(sums)}
    embed = Program(model.embed.lower(shapes.outer, shapes.batch), outside)
    if not taps.gradients:
        step = tapped_forward(model.stack.block, taps).lower(block, sums, x, context, tokens)
        return {
            "embed": embed,
            "forward": Program(step, tapped, beside=walked | outside, host=read),
        }
    step = tapped_backward(model.stack.block, taps).lower(block, sums, x, context, tokens, x)
    head = model.head_gradient.lower(shapes.outer, x, shapes.batch)
    last = of_block | {"activations": tree_bytes(x), "context": tree_bytes(context)}
    forward = model.block.lower(block, x, context)
    return {
        "embed": embed,
        "forward": Program(forward, of_block, beside=walked | outside, host=read),
        "loss": Program(head, outside, beside=last),
        "backward": Program(step, tapped, beside=walked, host=read),
    }


def factorization_programs(
    shapes: BlockShapes,
    taps: Taps,
    specs: Mapping[str, KernelSpec],
    ranks: Mapping[str, int],
    *,
    damping: float | None = None,
) -> dict[str, Program]:
    """The programs of `factor_block` with ranks, once per shape.

    Args:
      shapes: of the model.
      taps: with which the block was measured; what they measured decides the weighting.
      specs: the block's kernels that are factored, by path inside it.
      ranks: of them.
      damping: see `factorize`.

    Returns:
      By name, each with the block, the next one and all second moments of the block beside it, and
      on the host the factors that are done; in `write` these once more, as the file's content.
    """
    found = jax.eval_shape(lambda: taps.moments(taps.zeros()))
    beside = {
        "parameters": tree_bytes(shapes.block),
        "next block": shapes.next_block,
        "moments": tree_bytes(jax.eval_shape(taps.zeros)),
    }
    factors = factor_bytes(specs, ranks)
    done = {"factors": factors}
    programs = {
        "write": Program(ProgramMemory(0, 0, 0, 0), beside=beside, host={"factors": 2 * factors})
    }
    for path, spec in _kinds(specs, ranks).items():
        kernel = jax.ShapeDtypeStruct((spec.d_in, spec.d_out), _wide(spec))
        moment: SecondMoment = found[path]
        given = [weight for weight in (moment.sum, moment.gradient) if weight is not None]
        # In fp32 the kernel is the block's own array, and what is stored are the factors.
        own = kernel.dtype == spec.dtype
        named = {} if own else {"kernel": tree_bytes(kernel)}
        run = jax.jit(partial(factorize, damping=damping, max_rank=ranks[path]))
        shared = tree_bytes((kernel, given) if own else given)
        programs[f"factors of {path}"] = Program(
            run.lower(kernel, *given), named, shared, beside, done
        )
        full = jax.eval_shape(run, kernel, *given)
        left, right = (
            jax.ShapeDtypeStruct(shape, spec.dtype)
            for shape in ((spec.d_in, ranks[path]), (ranks[path], spec.d_out))
        )
        shared = tree_bytes((moment.sum, kernel, left, right) if own else moment.sum)
        programs[f"errors of {path}"] = Program(
            error_squares.lower(kernel, left, right, moment.sum),
            named,
            shared,
            beside | {"factors": tree_bytes(full)},
            done,
        )
    return programs


def factor_bytes(specs: Mapping[str, KernelSpec], ranks: Mapping[str, int]) -> int:
    """Bytes of the factors of these kernels, of one layer, as they are stored."""
    return sum(
        ranks[path] * (spec.d_in + spec.d_out) * jnp.dtype(spec.dtype).itemsize
        for path, spec in specs.items()
    )


def _wide(spec: KernelSpec) -> Any:
    return jnp.promote_types(spec.dtype, jnp.float32)


def _kinds(specs: Mapping[str, KernelSpec], ranks: Mapping[str, int]) -> dict[str, KernelSpec]:
    """One kernel of each shape."""
    kinds: dict[Any, str] = {}
    for path, spec in specs.items():
        kinds.setdefault((spec.d_in, spec.d_out, str(spec.dtype), ranks[path]), path)
    return {path: specs[path] for path in kinds.values()}
