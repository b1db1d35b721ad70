"""How the axes of a stored kernel map onto the matrix of the mathematics."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Layout"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of a stored kernel: `stack` axes first, then input and output axes in any order.

    The canonical form of a kernel is `(*stack, *in, *out)` and its matrix view
    `(*stack, d_in, d_out)`, so that `y = x @ kernel`. `stack` axes come from `nn.scan` or
    `nn.vmap`; they are whatever precedes the last `num_in + num_out` axes, so one layout serves a
    stacked leaf and the slice of it that a layer sees.

    Attributes:
      num_in: number of contracted axes.
      num_out: number of output axes.
      perm: permutation of the trailing `num_in + num_out` axes that yields `(*in, *out)`; None
        when they are stored in that order.

    Example:
      >>> import numpy as np
      >>> embedding = np.zeros((10, 4))            # stored (vocabulary, width)
      >>> Layout(perm=(1, 0)).matrix(embedding).shape  # as a head: y = x @ embedding.T
      (4, 10)
      >>> Layout(num_in=2).matrix(np.zeros((3, 2, 5, 7))).shape  # 3 stacked (heads, head_dim, out)
      (3, 10, 7)
    """

    num_in: int = 1
    num_out: int = 1
    perm: tuple[int, ...] | None = None

    def __post_init__(self):
        axes = tuple(range(self.num_in + self.num_out))
        if self.perm == axes:
            object.__setattr__(self, "perm", None)
        elif self.perm is not None and tuple(sorted(self.perm)) != axes:
            raise ValueError(f"`perm` {self.perm} is not a permutation of {axes}.")

    @property
    def num_axes(self) -> int:
        """Number of axes of one kernel without its stack axes."""
        return self.num_in + self.num_out

    def stack_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Leading stack axes of a stored array of this `shape`."""
        if len(shape) < self.num_axes:
            raise ValueError(f"A kernel of shape {tuple(shape)} has fewer axes than {self}.")
        return tuple(shape[: len(shape) - self.num_axes])

    def in_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Input axes, in canonical order, of a stored array of this `shape`."""
        return self._canonical_shape(shape)[: self.num_in]

    def out_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Output axes, in canonical order, of a stored array of this `shape`."""
        return self._canonical_shape(shape)[self.num_in :]

    def canonical(self, array: Any) -> Any:
        """Transposes a stored kernel to `(*stack, *in, *out)`; numpy and JAX arrays alike."""
        return array if self.perm is None else self._transpose(array, self.perm)

    def from_canonical(self, canonical: Any) -> Any:
        """Inverse of `canonical`."""
        if self.perm is None:
            return canonical
        return self._transpose(canonical, tuple(int(i) for i in np.argsort(self.perm)))

    def matrix(self, array: Any) -> Any:
        """Views a stored kernel as `(*stack, d_in, d_out)`."""
        shape = array.shape
        stack, size_in = self.stack_shape(shape), math.prod(self.in_shape(shape))
        return self.canonical(array).reshape(*stack, size_in, math.prod(self.out_shape(shape)))

    def from_matrix(self, matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int]) -> Any:
        """Inverse of `matrix`, given the input and output axes."""
        return self.from_canonical(matrix.reshape(*matrix.shape[:-2], *in_shape, *out_shape))

    def _canonical_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        trailing = tuple(shape[len(self.stack_shape(shape)) :])
        return trailing if self.perm is None else tuple(trailing[i] for i in self.perm)

    def _transpose(self, array: Any, perm: tuple[int, ...]) -> Any:
        lead = len(self.stack_shape(array.shape))
        return array.transpose(*range(lead), *(lead + i for i in perm))
