"""How long a step in a subspace is, next to one of all parameters."""

import math

__all__ = ["step_scale"]


def step_scale(matrix: tuple[int, ...], core: tuple[int, ...]) -> float:
    """`sqrt(d_in d_out / (s_in s_out))`: what makes a step in a subspace as long as Adam's own.

    Adam's step has entries of about the learning rate, whatever the gradient's scale. Columns of
    fitted projectors are nearly orthonormal, so `P Delta Q^T` has the norm of `Delta`, spread over
    more entries: their root mean square is smaller by this factor. Undone, one learning rate serves
    compressed kernels, parameters that are trained whole, and every size of subspace.

    Args:
      matrix: `(d_in, d_out)` of the kernel.
      core: `(s_in, s_out)` of its compressed gradient.

    Example:
      >>> step_scale((512, 2048), (256, 1024)), step_scale((8, 8), (8, 8))
      (2.0, 1.0)
    """
    return math.sqrt(math.prod(matrix) / math.prod(core))
