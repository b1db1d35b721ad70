"""Stages that walk the model: one block or one kernel on the device at a time.

What a stage holds besides its programs' arguments is said in `resident`: the block that is read
ahead while one is at work. Between blocks, the activations of all calibration rows lie on the host.
"""

import functools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax._compiling import loop_options
from emloc_jax.adapters import apply_bound, correction_terms, merged_kernel
from emloc_jax.emulator import (
    CompactMoment,
    Taps,
    calibration_step,
    compact_sides,
    factorize,
)
from emloc_jax.kernels import KernelSpec, find_kernels, flatten_leaves, intercept
from emloc_jax.memory._abstract_emulator import abstract_adapters, abstract_emulator, compressed
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._depends import depends_on
from emloc_jax.memory._setting import Setting
from emloc_jax.memory._stage import Program, Stage, tree_bytes
from emloc_jax.memory._target import Target
from emloc_jax.models import block_stack
from emloc_jax.training import make_head_loss

__all__ = ["calibration", "correction", "factorization", "merging"]


@depends_on("length", "chunk", "where", "calibration_rows", "calibration_batch", "gradients")
def calibration(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Second moments of one block at a time, over a batch of calibration rows.

    Forward with activations spilled to the host; with output gradients, a pass back through the
    blocks as well, from the loss and its gradient at the last block's output. Moments are taken
    for one group of kernels that read the same input after another.
    """
    with target.compiling():
        apply = intercept(abstract.model.apply)
        stack = block_stack(abstract.model, wrap=intercept)
        outer = jax.eval_shape(stack.outer, abstract.params)
        block = jax.eval_shape(lambda tree: stack.block_params(tree, 0), abstract.params)
        batch = setting.batch(setting.calibration_batch)
        inputs = batch["tokens"], batch["positions"], batch["segments"]
        x, context = jax.eval_shape(stack.embed, outer, *inputs)
        head_loss = make_head_loss(apply, chunk=setting.chunk)

        def jitted(function: Any) -> Any:
            return jax.jit(function, compiler_options=loop_options())

        programs = {
            "embed": Program(target.lower(jitted(stack.embed), outer, *inputs)),
            "block": Program(target.lower(jitted(stack.block), block, x, context)),
        }
        if setting.gradients:

            def last(outer: Any, x: Any, batch: Any) -> Any:
                return jax.grad(lambda x: head_loss(outer, x, batch)[0])(x)

            def back(params: Any, x: Any, context: Any, g: Any) -> Any:
                return jax.vjp(lambda x: stack.block(params, x, context), x)[1](g)[0]

            programs["loss"] = Program(target.lower(jitted(last), outer, x, batch))
            programs["back"] = Program(target.lower(jitted(back), block, x, context, x))
        for name, specs in _groups(abstract, setting, stack, block, x, context).items():
            programs[f"moments of {name}"] = _moments(
                setting, target, stack, block, specs, (x, context, batch["segments"])
            )
    per_row = tree_bytes(x) // setting.calibration_batch * setting.calibration_rows
    yield Stage(
        "calibrate",
        "emloc",
        programs,
        resident={"next block": tree_bytes(block)},
        host={"activations": per_row * (2 if setting.gradients else 1)},
    )


@depends_on("ratio", "where", "gradients")
def factorization(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Factoring one kernel of one layer at a time, with its moments."""
    programs = {}
    ranks = compressed(abstract, setting)
    sides = compact_sides({path: abstract.kernels[path] for path in ranks}, "auto")
    for path, spec in _kinds(abstract, ranks).items():
        d_in, d_out = spec.d_in, spec.d_out
        kernel = jax.ShapeDtypeStruct((d_in, d_out), jnp.float32)
        moment = _moment_of(d_in, d_out, path in sides.inputs)
        gradient = _moment_of(d_out, d_in, path in sides.gradients)
        run = jax.jit(functools.partial(factorize, max_rank=ranks[path]))
        given = (kernel, moment, gradient) if setting.gradients else (kernel, moment)
        arguments = {"parameters": tree_bytes(kernel), "moments": tree_bytes(given[1:])}
        programs[path] = Program(target.lower(run, *given), arguments)
    emulator = abstract_emulator(abstract, setting)
    largest = max((_kernel_bytes(spec) for spec in _kinds(abstract, ranks).values()), default=0)
    yield Stage(
        "factorize",
        "emloc",
        programs,
        resident={"kernel as stored": largest},
        disk={"emulator": tree_bytes(emulator)},
    )


@depends_on("ratio", "where", "lora_where", "lora_rank")
def correction(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Correcting the adapter of one kernel of one layer at a time."""
    adapters = abstract_adapters(abstract, setting)
    emulator = flatten_leaves(abstract_emulator(abstract, setting))
    programs: dict[str, Program] = {}
    for path, spec in _kinds(abstract, adapters).items():
        kernel, lora_a, lora_b = _one_layer(spec, setting.lora_rank)
        box = emulator[path]
        emulated: Any = kernel
        if hasattr(box, "rank"):
            emulated = tuple(
                jax.ShapeDtypeStruct(shape, spec.dtype)
                for shape in ((spec.d_in, box.rank), (box.rank, spec.d_out))
            )
        scale = np.float32(1)
        given = (lora_a, lora_b, kernel, emulated, None, scale)
        arguments = {
            "parameters": tree_bytes((kernel, emulated)),
            "trainables": tree_bytes((lora_a, lora_b)),
        }
        programs[f"terms of {path}"] = Program(
            target.lower(jax.jit(correction_terms), *given), arguments
        )
        terms = jax.eval_shape(correction_terms, *given)
        bound = target.lower(jax.jit(partial(apply_bound, bound="row")), terms, np.float32(3))
        programs[f"bound of {path}"] = Program(bound)
    resident = {"adapters": 2 * tree_bytes(adapters)}  # as trained, and corrected
    yield Stage("correct", "emloc", programs, resident)


@depends_on("lora_where", "lora_rank")
def merging(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Adding one kernel's adapter to it at a time."""
    adapters = abstract_adapters(abstract, setting)
    programs = {}
    for path, spec in _kinds(abstract, adapters).items():
        kernel, lora_a, lora_b = _one_layer(spec, setting.lora_rank)
        lowered = target.lower(merged_kernel, kernel, lora_a, lora_b, np.float32(1))
        arguments = {
            "parameters": tree_bytes(kernel),
            "trainables": tree_bytes((lora_a, lora_b)),
        }
        programs[path] = Program(lowered, arguments)
    yield Stage(
        "merge",
        "emloc",
        programs,
        resident={"adapters": tree_bytes(adapters)},
        disk={"merged model": tree_bytes(abstract.params)},
    )


def _groups(
    abstract: AbstractModel, setting: Setting, stack: Any, block: Any, x: Any, context: Any
) -> dict[str, dict[str, KernelSpec]]:
    """Kernels of a block that are compressed, by the input they share."""
    wanted = set(compressed(abstract, setting))
    found = find_kernels(lambda v, *given: stack.block(v["params"], *given), block, x, context)
    groups: dict[str, dict[str, KernelSpec]] = {}
    for path, spec in found.items():
        if f"{stack.name}/{path}" in wanted:
            groups.setdefault(spec.input_group, {})[path] = spec
    return groups


def _moments(
    setting: Setting,
    target: Target,
    stack: Any,
    block: Any,
    specs: Mapping[str, KernelSpec],
    inputs: tuple[Any, Any, Any],
) -> Program:
    """The library's calibration step on one block, whose loss is its output along a gradient."""
    x, context, segments = inputs

    def along(variables: Any, given: Any) -> jax.Array:
        y = stack.block(variables["params"], given["x"], given["context"])
        return jnp.vdot(y.astype(jnp.float32), given["g"].astype(jnp.float32))

    taps = Taps(specs, gradients=setting.gradients)
    step: Any = calibration_step(along, taps, mask=lambda given: given["segments"] > 0)
    sums = jax.eval_shape(taps.zeros)
    given = {"x": x, "context": context, "g": x, "segments": segments}
    arguments = {"moments": tree_bytes(sums)}
    return Program(target.lower(step, block, sums, given), arguments)


def _moment_of(own: int, other: int, compact: bool) -> Any:
    """A second moment of the side `own` of a kernel."""
    if not compact:
        return jax.ShapeDtypeStruct((own, own), jnp.float32)
    through = jax.ShapeDtypeStruct((other, other), jnp.float32)
    return CompactMoment(through, jax.ShapeDtypeStruct((own,), jnp.float32))  # pyright: ignore[reportArgumentType]


def _kinds(abstract: AbstractModel, paths: Any) -> dict[str, KernelSpec]:
    """One kernel of each shape."""
    kinds: dict[Any, str] = {}
    for path in paths:
        spec = abstract.kernels[path]
        kinds.setdefault((spec.d_in, spec.d_out, str(spec.dtype)), path)
    return {path: abstract.kernels[path] for path in kinds.values()}


def _one_layer(spec: KernelSpec, rank: int) -> tuple[Any, Any, Any]:
    return (
        jax.ShapeDtypeStruct((spec.d_in, spec.d_out), spec.dtype),
        jax.ShapeDtypeStruct((spec.d_in, rank), jnp.float32),
        jax.ShapeDtypeStruct((rank, spec.d_out), jnp.float32),
    )


def _kernel_bytes(spec: KernelSpec) -> int:
    return spec.d_in * spec.d_out * np.dtype(spec.dtype).itemsize
