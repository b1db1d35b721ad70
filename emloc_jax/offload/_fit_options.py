"""What a fit may cost, and what it did."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from flax import struct

from emloc_jax.errors import ConfigError

__all__ = ["DEFAULT_FIT", "FitNumbers", "FitOptions", "FitReport"]


class FitNumbers(NamedTuple):
    """The options that a compiled fit takes as arguments, so that changing them is free."""

    steps: Any
    learning_rate: Any
    beta: Any
    threshold: Any
    decay_to: Any


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How the values of a pair of projectors are learnt.

    Attributes:
      steps: the most Adam steps.
      learning_rate: of Adam on the values.
      beta: weight of the norms in the objective `error + beta (||P|| / sqrt(d_in) + ||Q|| /
        sqrt(d_out))`; each quotient is 1 for fresh projectors.
      threshold: a fit stops at this estimation error; a pair at or below it is not refitted.
      time_limit: seconds after which `fit` stops; at least a few steps are taken.
      decay_to: the learning rate falls along half a cosine to this fraction of itself; 1 keeps it.

    Raises:
      ConfigError: a number out of range.
    """

    steps: int = 100
    learning_rate: float = 0.1
    beta: float = 0.0
    threshold: float = 0.3
    time_limit: float | None = None
    decay_to: float = 1.0

    def __post_init__(self):
        finite = all(map(math.isfinite, (self.learning_rate, self.beta, self.threshold)))
        if not (
            finite
            and self.steps >= 1
            and self.learning_rate > 0
            and self.beta >= 0
            and self.threshold >= 0
            and 0 <= self.decay_to <= 1
            and (self.time_limit is None or self.time_limit > 0)
        ):
            raise ConfigError(
                f"{self}: steps, learning_rate and time_limit must be positive, beta and threshold "
                "not negative, decay_to in [0, 1]."
            )

    def numbers(self) -> FitNumbers:
        """All but the time limit, as a pytree."""
        return FitNumbers(*(getattr(self, name) for name in FitNumbers._fields))


DEFAULT_FIT = FitOptions()


@struct.dataclass
class FitReport:
    """What a fit achieved: scalars, or one entry for each matrix of a batch.

    Attributes:
      error_before: estimation error of the pair that was given.
      error_after: of the pair that was returned; never larger.
      steps: int32, Adam steps taken.
    """

    error_before: jax.Array
    error_after: jax.Array
    steps: jax.Array
