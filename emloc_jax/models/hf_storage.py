"""How a model's parameters lie in a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

__all__ = ["HfStorage", "HfTensor"]


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint.

    Attributes:
        name: its key, ``'model.layers.0.self_attn.q_proj.weight'``.
        shape: its shape as stored there; a linear layer is ``(d_out, d_in)``, GPT-2's ``Conv1D``
            is ``(d_in, d_out)``.
        transpose: the parameter here is the transpose of it.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter here."""
        return self.shape[::-1] if self.transpose else self.shape


@dataclasses.dataclass(frozen=True)
class HfStorage:
    """All tensors of one model, and what else its checkpoints may hold.

    Attributes:
        tensors: path in the unrolled tree to its tensor, in model order.
        copies: name that a checkpoint may hold besides, to the name of the tensor it repeats.
        prefix: of the names inside a model with a head, which checkpoints of the bare model leave
            out; ``'bert.'``.
        heads: modules (first parts of paths) that can be made afresh on an encoder that lacks them.
        others: names of other heads, which this model does not have and lets pass.
    """

    tensors: Mapping[str, HfTensor]
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    heads: tuple[str, ...] = ()
    others: re.Pattern[str] | None = None
