"""The loss on the test rows, of models that lie whole on the device."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax._compiling import loop_options
from emloc_jax.adapters import attach
from emloc_jax.memory._abstract_emulator import abstract_adapters, abstract_emulator
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._depends import depends_on
from emloc_jax.memory._setting import ROW, Setting
from emloc_jax.memory._stage import Program, Stage, tree_bytes
from emloc_jax.memory._target import Target
from emloc_jax.memory._whole_stages import kept_with_emulator, session_loss

__all__ = ["EVALUATION", "full_evaluation", "lora_evaluation", "whole_evaluation"]

EVALUATION = (*ROW, "chunk", "remat", "eval_rows", "eval_batch")


def whole_evaluation(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Of the original and of the emulator, each with adapters, while both are there."""
    adapters = abstract_adapters(abstract, setting)
    emulator = abstract_emulator(abstract, setting)
    programs = {
        f"loss of the {name}": _loss(
            abstract, setting, target, jax.eval_shape(attach, params, adapters), tree_bytes(params)
        )
        for name, params in (("original", abstract.params), ("emulator", emulator))
    }
    resident = {"parameters": tree_bytes(abstract.params)} | kept_with_emulator(abstract, setting)
    yield Stage("evaluate", "emloc", programs, resident=resident)


@depends_on(*EVALUATION, "lora_where", "lora_rank")
def lora_evaluation(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Of the original with adapters, if there are test rows."""
    if setting.eval_rows:
        own = jax.eval_shape(attach, abstract.params, abstract_adapters(abstract, setting))
        yield Stage("evaluate", "lora", {"loss": _loss(abstract, setting, target, own)})


@depends_on(*EVALUATION)
def full_evaluation(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Of the fp32 parameters that were trained, if there are test rows."""
    if setting.eval_rows:
        masters = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), abstract.params
        )
        resident = {"original": tree_bytes(abstract.params)}
        program = _loss(abstract, setting, target, masters)
        yield Stage("evaluate", "full", {"loss": program}, resident=resident)


def _loss(
    abstract: AbstractModel, setting: Setting, target: Target, params: Any, shared: int = 0
) -> Program:
    """What `evaluate_loss` runs on `params`; `shared` of their bytes are counted elsewhere."""
    _, loss = session_loss(abstract, setting)
    with target.lowering():
        run = jax.jit(loss, compiler_options=loop_options())
        lowered = run.lower(params, abstract.kind.batch(setting, setting.eval_batch))
    return Program(lowered, {"parameters": tree_bytes(params) - shared}, shared)
