"""LoRA on an original that is never whole on the device."""

from collections.abc import Iterator

from emloc_jax.kernels import intercept
from emloc_jax.memory._abstract_emulator import abstract_adapters
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._depends import depends_on
from emloc_jax.memory._setting import Setting
from emloc_jax.memory._stage import Program, Stage
from emloc_jax.memory._streamed_stages import streamed_evaluation, streamed_merging
from emloc_jax.memory._target import Target
from emloc_jax.models import block_stack
from emloc_jax.streaming import (
    StreamedLoraStep,
    block_shapes,
    streamed_lora_programs,
    streamed_model,
)
from emloc_jax.training import make_head_loss, make_optimizer, make_schedule

__all__ = ["streamed_lora_evaluation", "streamed_lora_merging", "streamed_lora_training"]

_LORA = ("lora_where", "lora_rank")
# Gone when the optimizer's update runs.
_WALKED = ("blocks", "block's adapters", "activations", "blocks' inputs")


@depends_on(*_LORA, "batch_size", "length", "accumulation", "chunk", "block_inputs")
def streamed_lora_training(
    abstract: AbstractModel, setting: Setting, target: Target
) -> Iterator[Stage]:
    """A step of `StreamedLoraStep`: two blocks on the device, adapters and their optimizer."""
    schedule = make_schedule(1e-3, steps=100, warmup=5)
    with target.lowering():
        step = StreamedLoraStep(
            block_stack(abstract.model, wrap=intercept),
            make_head_loss(intercept(abstract.model.apply), chunk=setting.chunk),
            make_optimizer(schedule),
            accumulation=setting.accumulation,
            schedule=schedule,
            inputs_in=setting.block_inputs,
        )
        adapters = abstract_adapters(abstract, setting)
        found = streamed_lora_programs(step, abstract.params, adapters, setting.batch())
        shapes = block_shapes(streamed_model(abstract.model), abstract.params, setting.batch())
    held = found.resident
    walked = {name: size for name, size in held.items() if name in _WALKED}
    yield Stage(
        "train",
        "streamed_lora",
        {
            name: Program(lowered, shared=None)
            if name == "update"
            else Program(lowered, shared=None, beside=walked, host={"block as read": shapes.read})
            for name, lowered in found.lowered.items()
        },
        resident={name: size for name, size in held.items() if name not in walked},
        host={"blocks' inputs": found.host},
    )


@depends_on(*_LORA)
def streamed_lora_merging(
    abstract: AbstractModel, setting: Setting, target: Target
) -> Iterator[Stage]:
    """Adding the adapters to the original, one kernel at a time."""
    yield from streamed_merging(abstract, setting, target, "streamed_lora")


@depends_on(*_LORA, "length", "chunk", "eval_rows", "eval_batch", "activations")
def streamed_lora_evaluation(
    abstract: AbstractModel, setting: Setting, target: Target
) -> Iterator[Stage]:
    """The loss on the test rows, if there are any."""
    if setting.eval_rows:
        yield from streamed_evaluation(abstract, setting, target, "streamed_lora")
