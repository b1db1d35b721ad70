"""From a model and options to blocks that are ready to train."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from emloc_jax.kernels import flatten_leaves
from emloc_jax.models import BlockStack
from emloc_jax.offload._adam import init_moments
from emloc_jax.offload._block_programs import BlockPrograms, core_shape
from emloc_jax.offload._block_slot import BlockSlot
from emloc_jax.offload._fresh_pairs import core_sizes, fresh_pairs, with_faster_products
from emloc_jax.offload._host_memory import check_host_memory, moment_bytes
from emloc_jax.offload._options import PipelineOptions
from emloc_jax.offload._pairs import Pair
from emloc_jax.offload._plan import (
    Plan,
    default_rules,
    full_path,
    make_plan,
    match_treatments,
)
from emloc_jax.offload._schedules import Schedule
from emloc_jax.offload._update_programs import UpdatePrograms

__all__ = ["Planned", "SetUp", "adam_shape", "plan_programs", "set_up"]

OUTER = -1


@dataclasses.dataclass(frozen=True)
class SetUp:
    """Slots of a model: one for what lies outside the blocks, one per block."""

    outer: BlockSlot
    blocks: list[BlockSlot]


@dataclasses.dataclass(frozen=True)
class Planned:
    """Programs of a model and the shapes they are for; nothing of it is allocated yet.

    Attributes:
      outer, blocks: shapes of the parameters outside the blocks and of each block.
      outer_updates: for what lies outside the blocks.
      programs: for each block; blocks of a kind share theirs.
      example: shapes of what a block takes: x and context.
    """

    outer: Any
    blocks: list[Any]
    outer_updates: UpdatePrograms
    programs: list[tuple[UpdatePrograms, BlockPrograms]]
    example: tuple[Any, Any]


def plan_programs(
    stack: BlockStack,
    params: Mapping[str, Any],
    schedule: Schedule,
    options: PipelineOptions,
    inputs: Callable[[Any], tuple[Any, ...]],
    batch: Any,
) -> Planned:
    """Plans every block on shapes alone, so that an option that does not fit is refused first."""
    abstract = jax.eval_shape(lambda tree: tree, dict(params))
    blocks = [
        jax.eval_shape(lambda tree, i=i: stack.block_params(tree, i), abstract)
        for i in range(stack.num_blocks)
    ]
    outer = jax.eval_shape(stack.outer, abstract)
    batch = jax.eval_shape(lambda tree: dict(tree), dict(batch))
    example = jax.eval_shape(lambda o, b: stack.embed(o, *inputs(b)), outer, batch)

    paths = list(flatten_leaves(outer))
    for block in blocks:
        named = (full_path(stack.name, path) for path in flatten_leaves(block))
        paths += [path for path in named if path not in paths]
    rules = default_rules(stack.name) if options.train is None else options.train
    treatments = match_treatments(rules, paths)
    compiled = _Compiled(stack, schedule, options, treatments, *example)
    outer_updates = compiled.updates(make_plan(outer, treatments))
    return Planned(
        outer, blocks, outer_updates, [compiled.of_kind(block) for block in blocks], example
    )


def set_up(
    stack: BlockStack,
    params: Mapping[str, Any],
    schedule: Schedule,
    options: PipelineOptions,
    inputs: Callable[[Any], tuple[Any, ...]],
    batch: Any,
) -> SetUp:
    """Plans every block, then copies parameters to the device and makes moments and projectors."""
    planned = plan_programs(stack, params, schedule, options, inputs, batch)
    programs, outer_updates = planned.programs, planned.outer_updates
    needed = moment_bytes(outer_updates, {}, planned.outer)
    for index, (own, _) in enumerate(programs):
        cores = core_sizes(stack.name, own.plan, schedule, options, index)
        needed += moment_bytes(own, cores, planned.blocks[index])
    check_host_memory(needed, options.host_memory)
    pairs = [
        fresh_pairs(stack.name, own.plan, schedule, options, index)
        for index, (own, _) in enumerate(programs)
    ]
    if options.product == "auto" and options.projectors is None:
        pairs = with_faster_products(pairs, planned.example[0], options.accumulation)
    blocks = [
        _slot(i, *programs[i], stack.block_params(params, i), pairs[i])
        for i in range(stack.num_blocks)
    ]
    outer = _slot(OUTER, outer_updates, None, stack.outer(params), {})
    return SetUp(outer, blocks)


class _Compiled:
    """Programs by kind of block: the same tree, shapes and dtypes."""

    def __init__(self, stack, schedule, options, treatments, x, context):
        self._stack, self._schedule, self._options = stack, schedule, options
        self._treatments, self._example = treatments, (x, context)
        self._known: dict[Any, tuple[UpdatePrograms, BlockPrograms]] = {}

    def of_kind(self, shapes: Any) -> tuple[UpdatePrograms, BlockPrograms]:
        leaves, treedef = jax.tree.flatten(shapes)
        key = (treedef, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if key not in self._known:
            plan = make_plan(
                shapes,
                self._treatments,
                prefix=self._stack.name,
                apply=lambda variables, *args: self._stack.block(variables["params"], *args),
                inputs=self._example,
            )
            updates = self.updates(plan)
            passes = BlockPrograms(self._stack.block, updates, wire=self._options.wire_dtype)
            self._known[key] = (updates, passes)
        return self._known[key]

    def updates(self, plan: Plan) -> UpdatePrograms:
        options = self._options
        return UpdatePrograms(
            plan,
            host=self._schedule.host,
            adam=options.adam,
            rounding=options.rounding,
            normalize=options.normalize,
        )


def _slot(
    index: int,
    updates: UpdatePrograms,
    programs: BlockPrograms | None,
    params: Any,
    pairs: dict[str, Pair],
) -> BlockSlot:
    device = jax.local_devices()[0]
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, device, may_alias=False), params)
    leaves = flatten_leaves(params)

    def moments(paths: list[str]) -> dict[str, Any]:
        return {path: init_moments(adam_shape(updates, pairs, leaves, path)) for path in paths}

    host = jax.local_devices(backend="cpu")[0]
    with jax.default_device(host):
        on_host = moments(updates.sent)
    return BlockSlot(
        index=index,
        updates=updates,
        programs=programs,
        params=params,
        pairs=pairs,
        errors={},
        # Committed, as what comes out of a step is: otherwise the second step compiles again.
        moments=jax.device_put(on_host, host),
        device_moments=jax.device_put(moments(updates.kept), device),
        extras=jax.device_put(updates.rounding_states(params), device),
    )


def adam_shape(
    updates: UpdatePrograms, pairs: dict[str, Pair], leaves: dict[str, Any], path: str
) -> tuple[int, ...]:
    """Shape of a leaf's gradient as Adam sees it."""
    spec = updates.plan.kernels.get(path)
    if spec is None:
        return leaves[path].shape
    return core_shape(spec, pairs.get(path, (None, None)))
