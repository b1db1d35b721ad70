"""What a pipelined trainer can be told."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from emloc_jax.errors import ConfigError
from emloc_jax.kernels import KernelSpec
from emloc_jax.offload._adam import AdamOptions
from emloc_jax.offload._fit_options import FitOptions
from emloc_jax.offload._pairs import Pair
from emloc_jax.offload._rounding import Rounding

__all__ = ["PipelineOptions"]


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """Options of `PipelinedTrainer`.

    Attributes:
      learning_rate: a rate, or a function of the number of steps taken (an Optax schedule).
      adam: Adam's numbers and the weight decay.
      clip: largest norm of all gradients of a step together, those of compressed kernels after
        compression. Then no update starts before the backward pass has ended. None: no clipping.
      accumulation: micro-batches per step; compressed gradients are added on the device, and only
        their sum crosses the link.
      train: ordered `(regex, treatment)`, see `match_treatments`. Paths are those of one block with
        the stack's name in front, `layers/mlp/up_proj/kernel`, and those outside the blocks. None:
        all kernels of the blocks in subspaces, the rest frozen.
      subspace: size of the compressed gradients: an int s, a fraction of each side, or rules.
      nnz: non-zeros per row of the projectors.
      fit: how projectors are learnt; its threshold also decides when they are.
      refit_every: steps between two checks of the projectors.
      product: 'sparse' gathers, 'dense' products with a cached copy of each projector, or 'auto':
        the faster of the two for each size, measured at set-up (see `faster_products`). A saved
        state keeps the choice, since the two round differently.
      wire: 'float32' or 'bfloat16' on the link, both ways.
      normalize: lengthen steps in subspaces to those of Adam in full, see `step_scale`.
      rounding: how updates of bf16 parameters are rounded, see `apply_update`.
      seed: of projectors and of stochastic rounding.
      host_memory: bytes that Adam's moments may take on the host; None: what is free there.
      projectors: a pure function from block index and kernel to the pair to start from (None on a
        side leaves it whole), instead of random ones of `subspace` and `nnz`. It is checked like
        any other.
    """

    learning_rate: float | Callable[[int], Any] = 1e-4
    adam: AdamOptions = AdamOptions()
    clip: float | None = None
    accumulation: int = 1
    train: Sequence[tuple[str, str]] | Mapping[str, str] | None = None
    subspace: int | float | Sequence[tuple[str, int | float]] = 0.5
    nnz: int = 4
    fit: FitOptions = FitOptions()
    refit_every: int = 1000
    product: Literal["sparse", "dense", "auto"] = "sparse"
    wire: Literal["float32", "bfloat16"] = "float32"
    normalize: bool = True
    rounding: Rounding = "nearest"
    seed: int = 0
    host_memory: int | None = None
    projectors: Callable[[int, KernelSpec], Pair] | None = None

    def __post_init__(self):
        if (
            self.accumulation < 1
            or self.refit_every < 1
            or (self.clip is not None and self.clip <= 0)
        ):
            raise ConfigError(
                f"accumulation is {self.accumulation}, refit_every {self.refit_every} and clip "
                f"{self.clip}; the first two must be at least 1, clip positive or None."
            )
        products, wires = ("sparse", "dense", "auto"), ("float32", "bfloat16")
        if self.product not in products or self.wire not in wires:
            raise ConfigError(
                f"product is '{self.product}' and wire '{self.wire}'; the first is one of "
                f"{', '.join(products)}, the second of {', '.join(wires)}."
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        value = self.learning_rate
        if not callable(value):
            return float(value)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return float(value(step))  # on the host: the device's queue is long

    @property
    def wire_dtype(self) -> Any:
        """The wire's dtype."""
        return jnp.dtype(self.wire)
