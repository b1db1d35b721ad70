"""What a streamed correction and merge run, on shapes: one kernel of one layer at a time."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax._program import Program, tree_bytes
from emloc_jax._program_memory import ProgramMemory
from emloc_jax.adapters import (
    CANDIDATES,
    Adapter,
    Bound,
    Problem,
    apply_bound,
    correction_terms,
    limits_to_try,
    mismatch,
)
from emloc_jax.kernels import KernelSpec, LowRankKernel
from emloc_jax.streaming._layer_adapters import split_adapter

__all__ = ["correction_programs", "merge_programs", "trial_bytes"]


def correction_programs(
    adapters: Mapping[str, Adapter],
    kernels: Mapping[str, KernelSpec],
    emulated: Mapping[str, Any],
    *,
    bound: Bound = "row",
    moments: int | None = None,
) -> dict[str, Program]:
    """The programs of `StreamedCorrection.correct`, once per shape of a kernel.

    Args:
      adapters: shapes of all of them.
      kernels: of the model, by path.
      emulated: the emulator's leaves, or their shapes, by path.
      bound: see `correct`.
      moments: bytes of a block's second moments that lie there to weigh it; 0: they are counted
        elsewhere, and the kernel's own is cut out of them; None: it is not weighted.

    Returns:
      By name, with the adapters beside each: as trained, split by layer, and corrected.
    """
    beside = {"adapters": 3 * tree_bytes(dict(adapters))}
    if moments is not None:
        beside["moments"] = moments
    programs: dict[str, Program] = {}
    seen = set()
    for path, adapter in adapters.items():
        problem = _one_layer(path, adapter, kernels[path], emulated[path])
        shapes = (problem.adapter, problem.original, problem.emulated)
        kind = str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), shapes))
        if kind in seen:
            continue
        seen.add(kind)
        scale, limit = problem.adapter.scale, np.float32(3)
        lora, (kernel, emulator) = jax.eval_shape(_matrices, *shapes)
        named = {"parameters": tree_bytes((kernel, emulator))}
        moment, weighing = None, 0
        if moments is not None:
            side = kernels[path].d_in
            moment = jax.ShapeDtypeStruct((side, side), jnp.float32)
            weighing = tree_bytes(moment) if moments else 0
        run = jax.jit(partial(correction_terms, scale=scale))
        terms = jax.eval_shape(run, *lora, kernel, emulator, moment)
        own = named | {"trainables": tree_bytes(lora)}
        programs[f"terms of {path}"] = Program(
            run.lower(*lora, kernel, emulator, moment), own, tree_bytes(lora) + weighing, beside
        )
        bounded = jax.jit(partial(apply_bound, bound=bound)).lower(terms, limit)
        programs[f"bound of {path}"] = Program(bounded, {"terms": tree_bytes(terms)}, beside=beside)
        compared = jax.jit(partial(mismatch, scale=scale, bound=bound))
        programs[f"mismatch of {path}"] = Program(
            compared.lower(terms, kernel, emulator, moment, limit=limit),
            named | {"terms": tree_bytes(terms)},
            weighing,
            beside,
        )
    return programs


def trial_bytes(
    adapters: Mapping[str, Adapter], candidates: Sequence[float] = CANDIDATES
) -> dict[str, int]:
    """Bytes that `choose_limit` keeps on the device while the trials' losses are taken.

    Every limit has its `lora_b` by layer, those above 0 share a `lora_a`, and all of them are
    joined to whole adapters on top of that; the trained adapters lie there whole and by layer.
    """
    count = len(limits_to_try(candidates))
    whole = tree_bytes(dict(adapters))
    first = sum(tree_bytes(adapter.lora_a) for adapter in adapters.values())
    return {
        "adapters": 2 * whole,
        "trials": first + (count - 1) * (whole - first) + count * whole,
    }


def merge_programs(
    adapters: Mapping[str, Adapter], kernels: Mapping[str, KernelSpec]
) -> dict[str, Program]:
    """What `stream_merge` computes, once per shape of a kernel.

    `materialize` of an attached kernel runs operation by operation: the product, the product times
    the scale, then the sum with the kernel, all in fp32.

    Args:
      adapters: shapes of all of them.
      kernels: of the model, by path.

    Returns:
      By name, with the adapters beside each: as trained, and split by layer.
    """
    programs: dict[str, Program] = {}
    beside = {"adapters": 2 * tree_bytes(dict(adapters))}
    for path in adapters:
        spec = kernels[path]
        kernel = jax.ShapeDtypeStruct((spec.d_in, spec.d_out), spec.dtype)
        wide = 4 * kernel.size
        narrow = tree_bytes(kernel) < wide
        figures = ProgramMemory(
            arguments=tree_bytes(kernel),
            outputs=tree_bytes(kernel),
            # Of fp32 the sum is the result itself, and the kernel needs no copy.
            temporaries=3 * wide if narrow else 2 * wide,
            aliased=0,
        )
        programs[f"merge of {path}"] = Program(
            figures,
            {"parameters": tree_bytes(kernel)},
            beside=beside,
            host={"kernel as read": 2 * tree_bytes(kernel)},
        )
    return programs


def _one_layer(path: str, adapter: Adapter, spec: KernelSpec, emulated: Any) -> Problem:
    """The problem of the first layer of a kernel, on shapes."""
    stack = len(spec.stack_shape)

    def cut(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[stack:], leaf.dtype)

    one = jax.eval_shape(lambda adapter: split_adapter(path, adapter)[0][1], adapter)
    original = jax.ShapeDtypeStruct(spec.shape[stack:], spec.dtype)
    if isinstance(emulated, LowRankKernel):
        emulated = dataclasses.replace(emulated, left=cut(emulated.left), right=cut(emulated.right))
    else:
        emulated = cut(emulated)
    return Problem(path, one, original, emulated, None)


def _matrices(adapter: Adapter, original: Any, emulated: Any) -> Any:
    """Of an adapter, and of its kernels."""
    return adapter.matrices(), Problem("", adapter, original, emulated, None).matrices()
