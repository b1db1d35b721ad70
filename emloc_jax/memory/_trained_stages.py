"""Stages that hold a whole model on the device: inference, and steps of training in memory."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax._compiling import loop_options
from emloc_jax.adapters import attach
from emloc_jax.kernels import intercept
from emloc_jax.memory._abstract_emulator import abstract_adapters
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._depends import depends_on
from emloc_jax.memory._setting import ROW, Setting
from emloc_jax.memory._stage import Program, Stage, tree_bytes
from emloc_jax.memory._target import Target
from emloc_jax.training import (
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
)

__all__ = ["LORA_FIELDS", "frozen_training", "full_training", "inference", "lora_training"]

_BATCH = ("batch_size", *ROW, "accumulation")
_STEP = (*_BATCH, "chunk", "remat")
LORA_FIELDS = (*_STEP, "lora_where", "lora_rank")


@depends_on(*_BATCH)
def inference(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Running the original: a pass over a batch, and the logits of the last token of each row.

    That is what the first token of every answer takes, and what other stages are compared with, at
    the rows of a micro-batch. The cache of longer answers comes on top. Of FLUX it is the velocity
    at one time.
    """
    kind = abstract.kind
    with target.compiling():
        apply = intercept(abstract.model.apply)

        def infer(params: Any, batch: Any) -> jax.Array:
            return kind.inference(apply, params, batch)

        batch = kind.inference_batch(setting, setting.micro_batch)
        program = jax.jit(infer, compiler_options=loop_options())
        lowered = target.lower(program, abstract.params, batch)
    arguments = {"parameters": tree_bytes(abstract.params)}
    yield Stage("inference", "inference", {"forward": Program(lowered, arguments)})


@depends_on(*LORA_FIELDS)
def lora_training(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """LoRA on the original, all of it on the device."""
    yield from frozen_training("train", "lora", abstract, abstract.params, setting, target)


@depends_on(*_STEP)
def full_training(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Adam on all parameters, with fp32 masters beside the original, as `finetune` trains them."""
    masters = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), abstract.params
    )
    resident = {"original": tree_bytes(abstract.params)}
    with target.compiling():
        program = _step(abstract, setting, masters, None, None, target)
    yield Stage("train", "full", {"step": program}, resident)


def frozen_training(
    name: str,
    method: str,
    abstract: AbstractModel,
    frozen: Any,
    setting: Setting,
    target: Target,
    resident: dict[str, int] | None = None,
) -> Iterator[Stage]:
    """LoRA on parameters that lie on the device as they are."""
    adapters = abstract_adapters(abstract, setting)

    def combine(adapters: Any, frozen: Any, key: jax.Array) -> Any:
        del key
        return attach(frozen, adapters)

    with target.compiling():
        program = _step(abstract, setting, adapters, frozen, combine, target)
    yield Stage(name, method, {"step": program}, resident or {})


def _step(
    abstract: AbstractModel,
    setting: Setting,
    trainables: Any,
    frozen: Any,
    combine: Callable[[Any, Any, jax.Array], Any] | None,
    target: Target,
) -> Program:
    """The library's own step, lowered on shapes."""
    apply = intercept(abstract.model.clone(remat=setting.remat).apply)
    schedule = make_schedule(1e-3, steps=100, warmup=5)
    tx = make_optimizer(schedule)
    extra: dict[str, Any] = {} if combine is None else {"combine": combine}
    step: Any = make_train_step(
        abstract.kind.loss(apply, setting.chunk),
        tx,
        accumulation=setting.accumulation,
        schedule=schedule,
        **extra,
    )
    state = jax.eval_shape(lambda tree: init_state(tree, tx), trainables)
    arguments = {
        "parameters": tree_bytes(frozen),
        "trainables": tree_bytes(state.trainables),
        "optimizer": tree_bytes(state.opt_state),
    }
    batch = abstract.kind.batch(setting, setting.batch_size)
    return Program(target.lower(step, state, frozen, batch), arguments)
