"""The stages of a run with an emulator, the original streamed or whole on the device."""

import dataclasses
from collections.abc import Iterator

from emloc_jax.memory._abstract_emulator import abstract_emulator
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._depends import depends_on
from emloc_jax.memory._evaluation_stages import EVALUATION, whole_evaluation
from emloc_jax.memory._setting import ROW, Setting
from emloc_jax.memory._stage import Stage, tree_bytes
from emloc_jax.memory._streamed_lora import streamed_lora_training
from emloc_jax.memory._streamed_stages import (
    streamed_calibration,
    streamed_correction,
    streamed_evaluation,
    streamed_factorization,
    streamed_merging,
)
from emloc_jax.memory._target import Target
from emloc_jax.memory._trained_stages import LORA_FIELDS, frozen_training, lora_training
from emloc_jax.memory._whole_stages import (
    kept_with_emulator,
    whole_calibration,
    whole_correction,
    whole_factorization,
    whole_merging,
)

__all__ = [
    "calibration",
    "correction",
    "emulator_alone",
    "emulator_training",
    "evaluation",
    "factorization",
    "merging",
    "polishing",
    "single_merging",
]

_CALIBRATION = (
    *("stream", *ROW, "chunk", "remat", "where", "gradients", "moments", "weighted"),
    *("calibration_rows", "calibration_batch", "activations"),
)
_LORA = ("lora_where", "lora_rank")
_EMULATOR = ("stream", "ratio", "where", "gradients", "moments", "weighted")


@depends_on(*_CALIBRATION)
def calibration(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Measuring second moments."""
    make = streamed_calibration if setting.stream else whole_calibration
    yield from make(abstract, setting, target)


@depends_on(*_CALIBRATION, "ratio")
def factorization(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Factoring kernels by their second moments."""
    make = streamed_factorization if setting.stream else whole_factorization
    yield from make(abstract, setting, target)


@depends_on(*LORA_FIELDS, *_EMULATOR)
def emulator_training(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """LoRA on the emulator; in memory, beside the original and the second moments."""
    resident = {}
    if not setting.stream:
        kept = kept_with_emulator(abstract, setting)
        emulator = tree_bytes(abstract_emulator(abstract, setting))
        # Leaves that are not compressed are the original's own.
        shared = emulator - kept["emulator"]
        del kept["emulator"]  # an argument of the step
        resident = kept | {"original": tree_bytes(abstract.params) - shared}
    frozen = abstract_emulator(abstract, setting)
    yield from frozen_training("train", "emloc", abstract, frozen, setting, target, resident)


@depends_on(*LORA_FIELDS, "ratio", "where")
def emulator_alone(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """LoRA on an emulator that was read from its folder, the original nowhere."""
    frozen = abstract_emulator(abstract, setting)
    yield from frozen_training("train", "emulator", abstract, frozen, setting, target)


@depends_on(*_CALIBRATION, *_LORA, "ratio", "choose_limit")
def correction(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Correcting the adapters for the original."""
    make = streamed_correction if setting.stream else whole_correction
    yield from make(abstract, setting, target)


@depends_on(*LORA_FIELDS, "stream", "block_inputs", "polish")
def polishing(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Steps of LoRA on the original after the correction, if there are any.

    The emulator and the moments are gone by then.
    """
    if setting.polish:
        make = streamed_lora_training if setting.stream else lora_training
        for stage in make(abstract, setting, target):
            yield dataclasses.replace(stage, name="polish", method="emloc")


@depends_on(*_LORA, *_EMULATOR)
def merging(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """Adding the adapters to the original."""
    make = streamed_merging if setting.stream else whole_merging
    yield from make(abstract, setting, target)


@depends_on(*EVALUATION, *_LORA, *_EMULATOR, "activations")
def evaluation(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """The loss on the test rows, if there are any."""
    if setting.eval_rows:
        make = streamed_evaluation if setting.stream else whole_evaluation
        yield from make(abstract, setting, target)


@depends_on(*_LORA, "stream")
def single_merging(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """A merge by itself: no emulator is there."""
    for stage in streamed_merging(abstract, setting, target):
        whole = {} if setting.stream else {"parameters": tree_bytes(abstract.params)}
        yield dataclasses.replace(stage, resident={**stage.resident, **whole})
