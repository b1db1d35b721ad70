"""The projectors that a pipelined run starts from."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from emloc_jax.kernels import KernelSpec, SparseProjector, cache, faster_products
from emloc_jax.offload._block_programs import core_shape
from emloc_jax.offload._options import PipelineOptions
from emloc_jax.offload._pairs import Pair, check_pair, make_pairs, subspace_sizes
from emloc_jax.offload._plan import Plan, full_path
from emloc_jax.offload._schedules import Schedule

__all__ = ["core_sizes", "fresh_pairs", "with_faster_products"]


def core_sizes(
    name: str, plan: Plan, schedule: Schedule, options: PipelineOptions, index: int
) -> dict[str, tuple[int, int]]:
    """Sizes of the compressed gradients of a block's kernels, by path; nothing is drawn for it.

    Arguments and errors are those of `fresh_pairs`.
    """
    if not (schedule.compress and plan.kernels):
        return {}
    if options.projectors is not None:
        given = fresh_pairs(name, plan, schedule, options, index)
        return {path: core_shape(plan.kernels[path], pair) for path, pair in given.items()}
    sizes = subspace_sizes(
        _named(name, plan), where=".*", subspace=options.subspace, nnz=options.nnz
    )
    return {path: sizes[full_path(name, path)] for path in plan.kernels}


def fresh_pairs(
    name: str, plan: Plan, schedule: Schedule, options: PipelineOptions, index: int
) -> dict[str, Pair]:
    """Projectors to start from, for the kernels of a block; none if the schedule does not compress.

    Args:
      name: of the stack.
      plan: of the block.
      schedule: of the run.
      options: of the run; its product 'auto' is left to `with_faster_products`.
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
    seed = int(np.random.SeedSequence([options.seed, index]).generate_state(1)[0])
    made = make_pairs(
        _named(name, plan), where=".*", subspace=options.subspace, nnz=options.nnz, seed=seed
    )
    own = {path: made[full_path(name, path)] for path in plan.kernels}
    if options.product == "dense":
        own = {path: (_cached(p), _cached(q)) for path, (p, q) in own.items()}
    return own


def with_faster_products(pairs: list[dict[str, Pair]], x: Any, parts: int) -> list[dict[str, Pair]]:
    """The pairs with a dense copy where that is faster here, measured once for each size.

    Args:
      pairs: of each block, path to pair, without copies.
      x: shape and dtype of what a block takes; all axes but the last are its rows.
      parts: micro-batches that the rows are cut into.
    """
    first = jax.tree.leaves(x)[0]
    rows = max(1, math.prod(first.shape[:-1]) // parts)
    dense: dict[tuple[int, int], bool] = {}

    def chosen(p: SparseProjector | None) -> SparseProjector | None:
        if p is None:
            return None
        size = (p.d, p.size)
        if size not in dense:
            dense[size] = faster_products(p, rows, first.dtype).cached is not None
        return cache(p) if dense[size] else p

    return [{path: (chosen(p), chosen(q)) for path, (p, q) in own.items()} for own in pairs]


def _named(name: str, plan: Plan) -> dict[str, KernelSpec]:
    """The kernels by the paths that rules know."""
    full = {full_path(name, path): spec for path, spec in plan.kernels.items()}
    return {path: dataclasses.replace(spec, path=path) for path, spec in full.items()}


def _cached(p: SparseProjector | None) -> SparseProjector | None:
    return None if p is None else cache(p)
