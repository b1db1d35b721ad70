"""Stages of a run that keeps the whole original on the device: what `finetune` does in memory.

It stays there from the first stage to the last, and so does the emulator, once it is made. The
second moments of all kernels go when the factors are there, unless they weigh the correction.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.adapters import trial_loss
from emloc_jax.emulator import Taps, calibration_step, error_squares, factorize
from emloc_jax.kernels import KernelSpec, LowRankKernel, flatten_leaves, intercept
from emloc_jax.memory._abstract_emulator import (
    abstract_adapters,
    abstract_emulator,
    compressed,
    selected,
)
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._setting import Setting
from emloc_jax.memory._stage import Program, Stage, tree_bytes
from emloc_jax.memory._streamed_stages import tensor_written
from emloc_jax.memory._target import Target
from emloc_jax.streaming import correction_programs, merge_programs, trial_bytes

__all__ = [
    "kept_with_emulator",
    "whole_calibration",
    "whole_correction",
    "session_loss",
    "whole_factorization",
    "whole_merging",
]


def whole_calibration(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Second moments of all kernels at once, a batch of rows at a time."""
    taps = _taps(abstract, setting)
    sums = jax.eval_shape(taps.zeros)
    apply, loss = session_loss(abstract, setting)

    kind = abstract.kind

    def forward(variables: Any, batch: Any) -> Any:
        return kind.forward(apply, variables, batch)

    def total(variables: Any, batch: Any) -> jax.Array:
        return loss(variables["params"], batch)[0]

    with target.lowering():
        run: Any = calibration_step(total if setting.gradients else forward, taps, mask=kind.mask)
        batch = kind.batch(setting, setting.calibration_batch)
        lowered = run.lower(abstract.params, sums, batch)
    arguments = {"parameters": tree_bytes(abstract.params), "moments": tree_bytes(sums)}
    yield Stage("calibrate", "emloc", {"step": Program(lowered, arguments)})


def whole_factorization(
    abstract: AbstractModel, setting: Setting, target: Target
) -> Iterator[Stage]:
    """One layer of one kernel after the other; the factors of all kernels add up."""
    taps, ranks = _taps(abstract, setting), compressed(abstract, setting)
    moments = jax.eval_shape(lambda: taps.moments(taps.zeros()))
    programs: dict[str, Program] = {}
    done = 0  # bytes of factors of the kernels before
    for path, rank in ranks.items():
        spec, moment = abstract.kernels[path], moments[path]
        stacked = jax.ShapeDtypeStruct((*spec.stack_shape, spec.d_in, spec.d_out), jnp.float32)
        run = jax.jit(partial(factorize, max_rank=rank))
        given = [w for w in (stacked, moment.sum, moment.gradient) if w is not None]
        one = [_one_layer(weight, spec) for weight in given]
        full, part = jax.eval_shape(run, *given), jax.eval_shape(run, *one)
        wide = {} if spec.dtype == jnp.float32 else {"kernel": tree_bytes(stacked)}
        done += tree_bytes(full)
        with target.lowering():
            # The factors of the layer before are dropped when those of the next one are there.
            beside = wide | {"factors": done + tree_bytes(part)}
            programs[f"factors of {path}"] = Program(
                run.lower(*one), {"one layer": tree_bytes(one)}, beside=beside
            )
    stored = tree_bytes(abstract_emulator(abstract, setting))
    programs |= _errors(abstract, target, ranks, moments, done)
    resident = {"parameters": tree_bytes(abstract.params), "moments": _moment_bytes(taps)}
    yield Stage("factorize", "emloc", programs, resident=resident, disk={"emulator": stored})


def whole_correction(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """One layer of one kernel after the other; before that, the losses of all limits."""
    adapters = abstract_adapters(abstract, setting)
    emulator = flatten_leaves(abstract_emulator(abstract, setting))
    resident = {"parameters": tree_bytes(abstract.params)} | kept_with_emulator(abstract, setting)
    if setting.choose_limit:
        _, loss = session_loss(abstract, setting)
        with target.lowering():
            batch = abstract.kind.batch(setting, setting.calibration_batch)
            lowered = trial_loss(loss).lower(abstract.params, adapters, batch)
        shared = tree_bytes((abstract.params, adapters))
        program = Program(lowered, shared=shared, beside=trial_bytes(adapters))
        yield Stage("choose limit", "emloc", {"loss": program}, resident=resident)
    with target.lowering():
        moments = 0 if setting.weighted else None
        programs = correction_programs(adapters, abstract.kernels, emulator, moments=moments)
    yield Stage("correct", "emloc", programs, resident=resident)


def whole_merging(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Adding one layer's adapter to its kernel at a time, and writing one tensor at a time."""
    adapters = abstract_adapters(abstract, setting)
    with target.lowering():
        programs = merge_programs(adapters, abstract.kernels)
    programs["write"] = tensor_written(abstract)
    resident = {"parameters": tree_bytes(abstract.params)} | kept_with_emulator(abstract, setting)
    yield Stage(
        "merge",
        "emloc",
        programs,
        resident=resident,
        disk={"merged model": tree_bytes(abstract.params)},
    )


def kept_with_emulator(abstract: AbstractModel, setting: Setting) -> dict[str, int]:
    """Bytes that stay on the device once there is an emulator, besides the original.

    Leaves that are not compressed are the original's own arrays.
    """
    leaves = flatten_leaves(abstract_emulator(abstract, setting)).values()
    factors = [leaf for leaf in leaves if isinstance(leaf, LowRankKernel)]
    kept = {"emulator": tree_bytes(factors)}
    if setting.weighted:
        kept["moments"] = _moment_bytes(_taps(abstract, setting))
    return kept


def _errors(
    abstract: AbstractModel, target: Target, ranks: dict[str, int], moments: Any, factors: int
) -> dict[str, Program]:
    """What the report measures when all kernels are factored and cut."""
    cut = sum(
        tree_bytes(_factors(spec, rank, lead=spec.stack_shape))
        for spec, rank in ((abstract.kernels[path], rank) for path, rank in ranks.items())
        if spec.dtype != jnp.float32  # else they are the factors themselves
    )
    programs = {}
    for path, rank in ranks.items():
        spec = abstract.kernels[path]
        stacked = jax.ShapeDtypeStruct((*spec.stack_shape, spec.d_in, spec.d_out), jnp.float32)
        wide = {} if spec.dtype == jnp.float32 else {"kernel": tree_bytes(stacked)}
        given = (
            _one_layer(stacked, spec),
            *_factors(spec, rank),
            _one_layer(moments[path].sum, spec),
        )
        programs[f"errors of {path}"] = Program(
            target.lower(error_squares, *given),
            {"one layer": tree_bytes(given)},
            beside=wide | {"factors": factors, "emulator": cut},
        )
    return programs


def _factors(spec: KernelSpec, rank: int, lead: tuple[int, ...] = ()) -> tuple[Any, Any]:
    return (
        jax.ShapeDtypeStruct((*lead, spec.d_in, rank), spec.dtype),
        jax.ShapeDtypeStruct((*lead, rank, spec.d_out), spec.dtype),
    )


def _one_layer(tree: Any, spec: KernelSpec) -> Any:
    """Shapes of one layer of an array or of a compact moment."""
    lead = len(spec.stack_shape)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[lead:], leaf.dtype), tree)


def session_loss(abstract: AbstractModel, setting: Setting) -> tuple[Any, Any]:
    """The intercepted model and its loss, as a run uses them in all stages."""
    apply = intercept(abstract.model.clone(remat=setting.remat).apply)
    return apply, abstract.kind.loss(apply, setting.chunk)


def _taps(abstract: AbstractModel, setting: Setting) -> Taps:
    return Taps(
        selected(abstract, setting.where), gradients=setting.gradients, moments=setting.moment_form
    )


def _moment_bytes(taps: Taps) -> int:
    return tree_bytes(jax.eval_shape(taps.zeros))
