"""Damped second moments and their roots."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from emloc_jax.emulator._moments import CompactMoment
from emloc_jax.emulator._products import eigh, matmul

__all__ = ["damped", "damped_through", "root"]

# In units of the machine epsilon, relative to each feature's own energy. The smallest ridge that
# decides, in fp32, which directions to keep among those that the data never excites: without it
# they are rounding noise, and the kernel is needlessly wrong off the calibration data.
_TIE_BREAK = 25

# Cholesky is used where damping keeps every eigenvalue this many epsilons above zero, relative to
# the largest one that a matrix of that size and trace can have. It costs a tenth of an `eigh`.
_SAFE = 10


def damped(moment: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """A second moment `(d, d)` scaled to mean eigenvalue one, with a ridge.

    The ridge is `damping` times the mean eigenvalue on every direction, plus a few epsilons of
    each feature's own energy. Adding to the eigenvalues does what a floor under them does, and
    needs no decomposition.

    Returns:
      The damped moment and its scale (the mean eigenvalue of `moment`).
    """
    scale = jnp.trace(moment) / moment.shape[0]
    moment = moment / scale
    tie_break = 1 + _TIE_BREAK * jnp.finfo(moment.dtype).eps
    on_diagonal = jnp.eye(moment.shape[0], dtype=bool)
    return jnp.where(on_diagonal, tie_break * moment + damping, moment), scale


def damped_through(
    moment: CompactMoment, kernel: jax.Array, damping: float
) -> tuple[CompactMoment, jax.Array]:
    """The same for a compact moment: its `through` becomes `K^T C K` of the damped `C`.

    The ridge is diagonal, so what it adds is exact.

    Args:
      moment: of the side `d` of the kernel.
      kernel: `(d, n)`, what the rows went through.
      damping: see `damped`.
    """
    scale = jnp.mean(moment.diagonal)
    eps = jnp.finfo(moment.through.dtype).eps
    ridge = _TIE_BREAK * eps * (moment.diagonal / scale) + damping
    through = moment.through / scale + matmul(kernel.mT * ridge, kernel)
    return moment.replace(through=through), scale  # pyright: ignore[reportAttributeAccessIssue]


def root(moment: jax.Array, damping: float) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A root `T`, `T T^T = moment`, and the map `rows -> rows @ T^-1`.

    Args:
      moment: what `damped` returned, `(d, d)`.
      damping: what it was damped with; decides (statically) for Cholesky or for one `eigh`, whose
        eigenvalues are floored where they are rounding noise, so that the inverse is finite.
    """
    eps = float(jnp.finfo(moment.dtype).eps)
    if damping >= _SAFE * eps * moment.shape[0]:
        lower = jnp.linalg.cholesky(moment)
        return lower, lambda rows: solve_triangular(lower, rows.mT, trans="T", lower=True).mT
    values, vectors = eigh(moment)
    scales = jnp.sqrt(jnp.maximum(values, _SAFE * eps * values[-1]))
    return vectors * scales, lambda rows: matmul(rows, (vectors / scales).mT)
