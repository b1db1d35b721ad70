"""Methods and their stages; another room can add to them or put its own programs in their place."""

from collections.abc import Callable, Iterator, Sequence

from emloc_jax.errors import ConfigError
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._emloc_stages import (
    calibration,
    correction,
    emulator_alone,
    emulator_training,
    evaluation,
    factorization,
    merging,
    polishing,
    single_merging,
)
from emloc_jax.memory._evaluation_stages import full_evaluation, lora_evaluation
from emloc_jax.memory._lsp_stage import lsp_training
from emloc_jax.memory._setting import Setting
from emloc_jax.memory._stage import Stage
from emloc_jax.memory._streamed_lora import (
    streamed_lora_evaluation,
    streamed_lora_merging,
    streamed_lora_training,
)
from emloc_jax.memory._target import Target
from emloc_jax.memory._trained_stages import full_training, inference, lora_training

__all__ = ["StageMaker", "methods", "register_method", "stages_of"]

StageMaker = Callable[[AbstractModel, Setting, Target], Iterator[Stage]]

_METHODS: dict[str, tuple[StageMaker, ...]] = {
    "inference": (inference,),
    "lora": (lora_training, lora_evaluation),
    "streamed_lora": (streamed_lora_training, streamed_lora_evaluation, streamed_lora_merging),
    "full": (full_training, full_evaluation),
    "lsp": (lsp_training,),
    "emloc": (
        calibration,
        factorization,
        emulator_training,
        correction,
        polishing,
        evaluation,
        merging,
    ),
}

# Parts of a run; they can be planned, but are no method.
_PARTS: dict[str, tuple[StageMaker, ...]] = {
    "emulator": (emulator_alone,),
    "emulate": (calibration, factorization),
    "correct": (correction,),
    "merge": (single_merging,),
}


def methods() -> tuple[str, ...]:
    """Names of the methods that can be planned."""
    return tuple(_METHODS)


def register_method(name: str, makers: Sequence[StageMaker]) -> None:
    """Says what the stages of a method are, in the order of a run; replaces what was said before.

    Args:
      name: of the method.
      makers: each gives stages: `maker(abstract, setting, target)`. A maker lowers its programs by
        `target.lower`, inside `target.compiling()` if it makes them.
    """
    _METHODS[name] = tuple(makers)


def stages_of(method: str) -> tuple[StageMaker, ...]:
    """What makes the stages of a method, or of a part of one.

    Raises:
      ConfigError: an unknown method.
    """
    known = _METHODS | _PARTS
    if method not in known:
        raise ConfigError(f"method='{method}' cannot be planned; known are {', '.join(known)}.")
    return known[method]
