"""How a model's parameters lie in a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["HfStorage", "HfTensor"]


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint.

    Attributes:
        name: its key, ``'model.layers.0.self_attn.q_proj.weight'``.
        shape: its shape as stored there; a linear layer is ``(d_out, d_in)``, GPT-2's ``Conv1D``
            is ``(d_in, d_out)``.
        transpose: the parameter here is the transpose of it.
        axes: the parameter here has these axes of it, in this order (a convolution's kernel);
            empty: as ``transpose`` says.
        units: so many leading axes of length 1 are stored, which the parameter here lacks.
        known_as: its name in the class of transformers where that is another one than files have;
            files may use it too, and PEFT always does.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    axes: tuple[int, ...] = ()
    units: int = 0
    known_as: str = ""

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter here."""
        return tuple(self.shape[self.units :][axis] for axis in self._order)

    @property
    def class_name(self) -> str:
        """Its name in the class of transformers."""
        return self.known_as or self.name

    def to_parameter(self, stored: Any) -> Any:
        """The parameter here, of the array that is stored there.

        Args:
            stored: an array of ``shape``.

        Returns:
            An array of ``parameter_shape``, a view where that is possible.

        Example:
            >>> import numpy as np
            >>> from emloc_jax.models import HfTensor
            >>> HfTensor("fc.weight", (3, 2), transpose=True).to_parameter(np.ones((3, 2))).shape
            (2, 3)
        """
        return stored.reshape(self.shape[self.units :]).transpose(self._order)

    def to_stored(self, parameter: Any) -> Any:
        """The inverse of ``to_parameter``."""
        back = [int(axis) for axis in np.argsort(self._order)]
        return parameter.transpose(back).reshape(self.shape)

    @property
    def _order(self) -> tuple[int, ...]:
        forward = tuple(range(len(self.shape) - self.units))
        return self.axes or (forward[::-1] if self.transpose else forward)


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
