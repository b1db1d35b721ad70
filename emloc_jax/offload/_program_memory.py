"""Memory of the trainer's compiled programs, from shapes alone."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax._program_memory import ProgramMemory, analysed
from emloc_jax.kernels import flatten_leaves
from emloc_jax.models import BlockStack
from emloc_jax.offload._adam import init_moments
from emloc_jax.offload._adam_update import Update
from emloc_jax.offload._batch import token_inputs
from emloc_jax.offload._fit import fit_programs
from emloc_jax.offload._fresh_pairs import fresh_pairs
from emloc_jax.offload._options import PipelineOptions
from emloc_jax.offload._outer_programs import HeadLoss, OuterPrograms
from emloc_jax.offload._schedules import schedule_named
from emloc_jax.offload._setup import Planned, adam_shape, plan_programs
from emloc_jax.offload._stream_refit import pair_error
from emloc_jax.offload._update_programs import UpdatePrograms

__all__ = ["program_memory"]


def program_memory(
    stack: BlockStack,
    params: Mapping[str, Any],
    head_loss: HeadLoss,
    batch: Mapping[str, Any],
    *,
    schedule: str = "lsp",
    options: PipelineOptions = PipelineOptions(),
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
    device: Any = None,
) -> dict[str, ProgramMemory]:
    """What each program of a `PipelinedTrainer` needs on a device.

    Compiles them, and allocates nothing but the projectors of one block: shapes suffice for
    parameters and batch, so a model that does not fit here can be looked at. Programs of the passes
    are those of the first block; a step with several micro-batches also holds their sums.

    Args:
      stack, params, head_loss, batch, schedule, options, inputs: as for `PipelinedTrainer`; of the
        products of projectors 'auto' counts as 'sparse'.
      device: what to compile for; None: the default device.

    Returns:
      By name: `embed`, `forward`, `head`, `backward`; where anything crosses the link `apply`, and
      where something is updated on the device `update`; of a schedule that compresses the check of
      the projectors, `full_gradients` of a block and `fit` of the kernel that needs most for it.

    Raises:
      ConfigError, UnmatchedRuleError, UnsupportedKernelError, ProjectorError: as the trainer.
    """
    kind = schedule_named(schedule)
    inputs = token_inputs if inputs is None else inputs
    planned = plan_programs(stack, params, kind, options, inputs, batch)
    pairs = fresh_pairs(stack.name, planned.programs[0][0].plan, kind, options, 0)
    shapes = jax.eval_shape(lambda tree: tree, (pairs, dict(batch)))
    outer = OuterPrograms(
        stack.embed, inputs, head_loss, planned.outer_updates, wire=options.wire_dtype
    )
    with jax.default_device(device):  # of shapes only from here on
        lowered = dict(_outer(planned, outer, shapes[1]))
        lowered |= dict(_block(planned, shapes[0], options))
        found = {name: analysed(program) for name, program in lowered.items()}
        fits = [analysed(program) for program in _fits(planned, shapes[0])]
    return found | ({"fit": max(fits, key=lambda memory: memory.added)} if fits else {})


def _outer(planned: Planned, programs: OuterPrograms, batch: Any) -> Iterator[tuple[str, Any]]:
    yield "embed", programs.embed.lower(planned.outer, batch)
    yield "head", programs.head.lower(planned.outer, planned.example[0], batch, np.float32(1))


def _block(
    planned: Planned, pairs: Any, options: PipelineOptions
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    updates, passes = planned.programs[0]
    params, (x, context) = planned.blocks[0], planned.example
    yield "forward", passes.forward.lower(params, x, context)
    backward = passes.backward, (params, pairs, x, context, x, None)
    yield "backward", backward[0].lower(*backward[1], last=True)
    _, gradients = jax.eval_shape(lambda *args: backward[0](*args, last=True), *backward[1])

    key = jax.eval_shape(lambda: jax.random.key(0))
    extras = jax.eval_shape(updates.rounding_states, params)
    if updates.sent:
        deltas: Any = {path: _like(g, options.wire_dtype) for path, g in gradients.host.items()}
        decay: Any = jax.ShapeDtypeStruct((), jnp.float32)
        update = Update(deltas, decay)
        yield "apply", updates.apply.lower(params, pairs, update, extras, key)
    if updates.kept:
        moments = _moments(updates, pairs, params)
        number = np.float32(1)
        given = params, gradients.device, moments, extras, key, number, number
        yield "update", updates.update_on_device.lower(*given)
    if pairs:
        yield "full_gradients", passes.full_gradients.lower(params, x, context, x)


def _fits(planned: Planned, pairs: Any) -> Iterator[jax.stages.Lowered]:
    """The check and fit of each kind of kernel."""
    kernels, seen = planned.programs[0][0].plan.kernels, set()
    for path, pair in pairs.items():
        spec = kernels[path]
        g = jax.ShapeDtypeStruct((spec.d_in, spec.d_out), jnp.float32)
        leaves, structure = jax.tree.flatten((g, pair))
        kind = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if kind not in seen:
            seen.add(kind)
            yield pair_error.lower(g, *pair)
            yield from fit_programs(g, *pair)


def _moments(updates: UpdatePrograms, pairs: Any, params: Any) -> dict[str, Any]:
    leaves = flatten_leaves(params)
    shapes = {path: adam_shape(updates, pairs, leaves, path) for path in updates.kept}
    return jax.eval_shape(lambda: {path: init_moments(shape) for path, shape in shapes.items()})


def _like(array: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, dtype)
