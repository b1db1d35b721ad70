"""The entries of a compression report, from figures that are taken layer by layer."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.emulator._compact_error import compact_square
from emloc_jax.emulator._factorization import Factorization
from emloc_jax.emulator._moments import CompactMoment
from emloc_jax.emulator._products import matmul
from emloc_jax.emulator._report import KernelReport
from emloc_jax.kernels import KernelSpec

__all__ = ["error_squares", "kernel_report"]


@jax.jit
def error_squares(
    kernel: jax.Array,
    left: jax.Array,
    right: jax.Array,
    moment: jax.Array | CompactMoment | None,
) -> jax.Array:
    """`||X (K - K_E)||^2` and `||X K||^2` of one kernel; of `K` itself without a moment.

    Args:
      kernel: `(d_in, d_out)`, fp32.
      left: `(d_in, rank)`, as stored.
      right: `(rank, d_out)`, as stored.
      moment: `(d_in, d_in)`, compact (the factors must come from it), or None.

    Returns:
      `(2,)` fp32, none negative.

    Example:
      >>> left, right = jnp.array([[3.0], [0.0]]), jnp.array([[1.0, 0.0]])
      >>> error_squares(jnp.diag(jnp.array([3.0, 2.0])), left, right, None).tolist()
      [4.0, 13.0]
    """

    if isinstance(moment, CompactMoment):
        lost = compact_square(kernel, left, right, moment)
        return jnp.maximum(jnp.stack([lost, jnp.trace(moment.through)]), 0)

    def square(matrix: jax.Array) -> jax.Array:
        weighted = matrix if moment is None else matmul(moment, matrix)
        return jnp.maximum(jnp.sum(matrix * weighted), 0)

    return jnp.stack([square(kernel - matmul(left, right).astype(kernel.dtype)), square(kernel)])


def kernel_report(
    spec: KernelSpec,
    rank: int | None,
    squares: np.ndarray | None = None,
    errors: Sequence[np.ndarray] = (),
    others: Mapping[str, tuple[str, str]] | None = None,
) -> KernelReport:
    """What became of one kernel.

    Args:
      spec: of the kernel.
      rank: of its factors; None: it stays whole.
      squares: of its `Factorization`, `(*stack, n)`.
      errors: `error_squares` of every layer of the stack.
      others: why a kernel stays whole, by path: `(status, reason)`.
    """
    size = math.prod(spec.shape)
    width = np.dtype(spec.dtype).itemsize
    if rank is None or squares is None:
        status, reason = (others or {}).get(
            spec.path, ("kept", "no rank in reach makes it smaller")
        )
        return KernelReport(
            path=spec.path,
            shape=spec.shape,
            rank=None,
            ratio=1.0,
            calibration_error=None,
            weighted_error=None,
            bytes_before=size * width,
            bytes_after=size * width,
            status=status,  # pyright: ignore[reportArgumentType]
            reason=reason,
        )
    kept = math.prod(spec.stack_shape) * rank * (spec.d_in + spec.d_out)
    lost, whole = np.sum(np.asarray(errors, np.float64), axis=0)
    spectrum = Factorization(None, None, squares)  # pyright: ignore[reportArgumentType]
    return KernelReport(
        path=spec.path,
        shape=spec.shape,
        rank=rank,
        ratio=kept / size,
        calibration_error=math.sqrt(lost / (whole if whole > 0 else 1)),
        weighted_error=float(spectrum.relative_errors()[rank]),
        bytes_before=size * width,
        bytes_after=kept * width,
        status="compressed",
    )
