"""From a model and options to blocks that are ready to train."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from emloc_jax.errors import PlanError
from emloc_jax.kernels import SparseProjector, cache, flatten_leaves
from emloc_jax.models import BlockStack
from emloc_jax.offload._adam import init_moments
from emloc_jax.offload._block_programs import BlockPrograms, core_shape
from emloc_jax.offload._block_slot import BlockSlot
from emloc_jax.offload._options import PipelineOptions
from emloc_jax.offload._pairs import Pair, check_pair, make_pairs
from emloc_jax.offload._plan import (
    Plan,
    default_rules,
    full_path,
    make_plan,
    match_treatments,
)
from emloc_jax.offload._schedules import Schedule
from emloc_jax.offload._update_programs import UpdatePrograms

__all__ = ["SetUp", "fresh_pairs", "set_up"]

OUTER = -1


@dataclasses.dataclass(frozen=True)
class SetUp:
    """Slots of a model: one for what lies outside the blocks, one per block."""

    outer: BlockSlot
    blocks: list[BlockSlot]


def set_up(
    stack: BlockStack,
    params: Mapping[str, Any],
    schedule: Schedule,
    options: PipelineOptions,
    inputs: Callable[[Any], tuple[Any, ...]],
    batch: Any,
) -> SetUp:
    """Plans every block, then copies parameters to the device and makes moments and projectors.

    Plans are made on shapes alone, so that an option that does not fit is refused first.
    """
    abstract = jax.eval_shape(lambda tree: tree, dict(params))
    count = range(stack.num_blocks)
    block_shapes = [
        jax.eval_shape(lambda tree, i=i: stack.block_params(tree, i), abstract) for i in count
    ]
    outer_shapes = jax.eval_shape(stack.outer, abstract)
    example = jax.eval_shape(lambda tree: dict(tree), dict(batch))
    x, context = jax.eval_shape(lambda o, b: stack.embed(o, *inputs(b)), outer_shapes, example)

    paths = list(flatten_leaves(outer_shapes))
    for block in block_shapes:
        named = (full_path(stack.name, path) for path in flatten_leaves(block))
        paths += [path for path in named if path not in paths]
    rules = default_rules(stack.name) if options.train is None else options.train
    treatments = match_treatments(rules, paths)
    compiled = _Compiled(stack, schedule, options, treatments, x, context)
    programs = [compiled.of_kind(block) for block in block_shapes]
    pairs = [
        fresh_pairs(stack.name, own.plan, schedule, options, index)
        for index, (own, _) in enumerate(programs)
    ]
    outer_updates = compiled.updates(make_plan(outer_shapes, treatments))
    kinds = [(own, pairs[i], block_shapes[i]) for i, (own, _) in enumerate(programs)]
    _check_host_memory([*kinds, (outer_updates, {}, outer_shapes)], options.host_memory)
    blocks = [
        _slot(i, *programs[i], stack.block_params(params, i), pairs[i])
        for i in range(stack.num_blocks)
    ]
    outer = _slot(OUTER, outer_updates, None, stack.outer(params), {})
    return SetUp(outer, blocks)


def fresh_pairs(
    name: str, plan: Plan, schedule: Schedule, options: PipelineOptions, index: int
) -> dict[str, Pair]:
    """Projectors to start from, for the kernels of a block; none if the schedule does not compress.

    Args:
      name: of the stack.
      plan: of the block.
      schedule: of the run.
      options: of the run.
      index: of the block.

    Raises:
      ProjectorError: a kernel too small for its subspace.
    """
    if not (schedule.compress and plan.kernels):
        return {}
    if options.projectors is not None:
        given = {path: options.projectors(index, spec) for path, spec in plan.kernels.items()}
        for path, pair in given.items():
            check_pair(plan.kernels[path], pair)
        return given
    specs = {
        full_path(name, path): dataclasses.replace(spec, path=full_path(name, path))
        for path, spec in plan.kernels.items()
    }
    seed = int(np.random.SeedSequence([options.seed, index]).generate_state(1)[0])
    made = make_pairs(specs, where=".*", subspace=options.subspace, nnz=options.nnz, seed=seed)
    prefix = len(full_path(name, ""))
    own = {path[prefix:]: pair for path, pair in made.items()}
    if options.product == "dense":
        own = {path: (_cached(p), _cached(q)) for path, (p, q) in own.items()}
    return own


def _cached(p: SparseProjector | None) -> SparseProjector | None:
    return None if p is None else cache(p)


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
            plan, host=self._schedule.host, adam=options.adam, rounding=options.rounding
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
        return {path: init_moments(_adam_shape(updates, pairs, leaves, path)) for path in paths}

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        on_host = moments(updates.sent)
    return BlockSlot(
        index=index,
        updates=updates,
        programs=programs,
        params=params,
        pairs=pairs,
        errors={},
        moments=on_host,
        device_moments=moments(updates.kept),
        extras=updates.rounding_states(params),
    )


def _adam_shape(
    updates: UpdatePrograms, pairs: dict[str, Pair], leaves: dict[str, Any], path: str
) -> tuple[int, ...]:
    """Shape of a leaf's gradient as Adam sees it."""
    spec = updates.plan.kernels.get(path)
    if spec is None:
        return leaves[path].shape
    return core_shape(spec, pairs.get(path, (None, None)))


def _check_host_memory(
    kinds: list[tuple[UpdatePrograms, dict[str, Pair], Any]], limit: int | None
) -> None:
    """Refuses moments that the host has no room for, before any is made.

    Raises:
      PlanError: they do not fit.
    """
    needed = 0
    for updates, pairs, shapes in kinds:
        leaves = flatten_leaves(shapes)
        for path in updates.sent:
            needed += 8 * math.prod(_adam_shape(updates, pairs, leaves, path))
    if limit is None:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > limit:
        raise PlanError(
            f"Adam's moments need {needed / 1e9:.3g} GB on the host, which has {limit / 1e9:.3g} "
            "GB. Make the subspace smaller, compress more kernels, or freeze some."
        )
