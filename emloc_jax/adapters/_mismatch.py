"""How far original plus adapter is from emulator plus adapter (arrays only)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emloc_jax.adapters._bound import Bound, bound_gain
from emloc_jax.adapters._stack import each_matrix
from emloc_jax.adapters._terms import CorrectionTerms, Emulated

__all__ = ["Mismatch", "mismatch"]


class Mismatch(NamedTuple):
    """Figures of one kernel, each (*stack,).

    Attributes:
      before, after: relative Frobenius mismatch of the maps on span(lora_a).
      inputs_before, inputs_after: the same over the calibration inputs; None without a moment.
      bounded: share of rows (kernels, columns) whose correction was cut.
      ratio: Frobenius norm of the correction over that of what was learned; inf for an untrained
        adapter.
    """

    before: jax.Array
    after: jax.Array
    inputs_before: jax.Array | None
    inputs_after: jax.Array | None
    bounded: jax.Array
    ratio: jax.Array


def mismatch(
    terms: CorrectionTerms,
    kernel: jax.Array,
    emulated: Emulated,
    moment: jax.Array | None,
    scale: jax.Array | float,
    limit: jax.Array | float,
    *,
    bound: Bound,
) -> Mismatch:
    """Compares the two maps before and after the correction, relative to the emulator's.

    With `E = K - K_E` and `G = g · Delta` the map on an orthonormal basis `U` of span(lora_a) is
    off by `Uᵀ E` before and by `Uᵀ E - scale · G` after. Over the calibration inputs it is off by
    `‖C^½ E‖` and by `‖C^½ (E - scale · U G)‖`.

    Args:
      terms: of the uncorrected adapter.
      kernel: (*stack, d_in, d_out).
      emulated: factors or matrix.
      moment: (*stack, d_in, d_in), or None.
      scale: of the adapter.
      limit: see `bound_gain`.
      bound: see `bound_gain`.

    Example:
      >>> from emloc_jax.adapters._terms import correction_terms
      >>> pair = (jnp.eye(2), jnp.ones((2, 2)))  # kernel and emulated kernel
      >>> terms = correction_terms(jnp.eye(2), jnp.ones((2, 2)), *pair, None, 1.0)
      >>> result = mismatch(terms, *pair, None, 1.0, jnp.inf, bound="row")
      >>> [round(float(value), 3) for value in (result.before, result.after, result.ratio)]
      [0.354, 0.0, 0.707]
    """
    one = partial(
        _one_kernel,
        scale=jnp.asarray(scale, jnp.float32),
        limit=jnp.asarray(limit, jnp.float32),
        bound=bound,
    )
    with jax.default_matmul_precision("highest"):
        return each_matrix(one, terms.basis.shape[:-2], terms, kernel, emulated, moment)


@partial(jax.jit, static_argnames="bound")
def _one_kernel(terms, kernel, emulated, moment, *, scale, limit, bound) -> Mismatch:
    gain = bound_gain(terms, limit, bound=bound)
    cut = gain < 1
    if bound == "row":
        bounded = cut[..., 0].sum(-1) / jnp.maximum(terms.live.sum(-1), 1)
    else:
        bounded = cut.mean((-2, -1))
    subtracted = gain * terms.delta
    basis = jnp.where(terms.live, terms.basis, 0.0)
    if isinstance(emulated, tuple):
        emulated = emulated[0].astype(jnp.float32) @ emulated[1].astype(jnp.float32)
    emulated = emulated.astype(jnp.float32)
    error = kernel.astype(jnp.float32) - emulated
    target = emulated + scale * basis @ terms.learned
    on_span = (basis.T @ error, basis.T @ error - scale * subtracted, basis.T @ target)
    span = _relative(*(jnp.square(x).sum() for x in on_span))
    norms = (jnp.linalg.norm(subtracted), jnp.linalg.norm(terms.learned))
    ratio = jnp.where(norms[0] > 0, norms[0] / norms[1], 0.0)
    if moment is None:
        return Mismatch(*span, None, None, bounded, ratio)

    moment = moment.astype(jnp.float32)
    seen, seen_error, seen_emulated = moment @ basis, moment @ error, moment @ emulated
    rest, seen_rest = error - scale * basis @ subtracted, seen_error - scale * seen @ subtracted
    seen_target = seen_emulated + scale * seen @ terms.learned
    pairs = ((error, seen_error), (rest, seen_rest), (target, seen_target))
    inputs = _relative(*((x * seen_x).sum() for x, seen_x in pairs))
    return Mismatch(*span, *inputs, bounded, ratio)


def _relative(before, after, target) -> tuple[jax.Array, jax.Array]:
    target = jnp.where(target > 0, target, 1.0)
    return jnp.sqrt(jnp.maximum(before, 0) / target), jnp.sqrt(jnp.maximum(after, 0) / target)
