"""The matrices that a correction is made of (arrays only)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emloc_jax.adapters._stack import each_matrix

__all__ = ["CorrectionTerms", "Emulated", "correction_terms"]

#: A kernel of the emulator: its factors (left, right), or the matrix itself.
Emulated = jax.Array | tuple[jax.Array, jax.Array]

# Relative to the mean eigenvalue of UᵀCU. float32 sums carry an error near 1e-7 of the trace, so
# directions below this level hold noise, and the ridge sends their correction to zero.
RIDGE = 1e-6


class CorrectionTerms(NamedTuple):
    """One adapter in the orthonormal basis of what it reads, and the emulator's error there.

    Attributes:
      basis: (*stack, d_in, rank), `U` of the thin SVD `lora_a = U S Vᵀ`.
      learned: (*stack, rank, d_out), `b' = S Vᵀ lora_b`, so that `U b' = lora_a lora_b`.
      delta: (*stack, rank, d_out), what an unbounded correction subtracts from `b'`.
      live: (*stack, rank), False where `S` is zero up to rounding: that column of `basis` is
          arbitrary, the adapter does not read it, and `delta` is zero there.
    """

    basis: jax.Array
    learned: jax.Array
    delta: jax.Array
    live: jax.Array


def correction_terms(
    lora_a: jax.Array,
    lora_b: jax.Array,
    kernel: jax.Array,
    emulated: Emulated,
    moment: jax.Array | None,
    scale: jax.Array | float,
) -> CorrectionTerms:
    """Computes `Delta = Uᵀ (K - K_E) / scale`, or its calibration-weighted form, in float32.

    The plain form (EMLoC Algorithm 1) makes original plus adapter equal to emulator plus adapter
    for every input in span(lora_a). With a second moment `C = Σ x xᵀ` the form is

        Delta = (Uᵀ C U)⁻¹ Uᵀ C (K - K_E) / scale

    which minimises the difference over the calibration inputs instead (least squares). Biases
    cancel and never enter. Factors are multiplied from the thin side: `K_E` is not formed.

    Args:
      lora_a: (*stack, d_in, rank).
      lora_b: (*stack, rank, d_out).
      kernel: (*stack, d_in, d_out), any float dtype.
      emulated: (left (*stack, d_in, r), right (*stack, r, d_out)), or (*stack, d_in, d_out).
      moment: (*stack, d_in, d_in), or None for the plain form.
      scale: what the forward pass multiplies `lora_a @ lora_b` with.

    Returns:
      The terms, float32.

    Example:
      >>> kernel = jnp.eye(4)
      >>> terms = correction_terms(
      ...     jnp.eye(4)[:, :2], jnp.zeros((2, 4)), kernel, jnp.zeros((4, 4)), None, 2.0
      ... )
      >>> float(jnp.linalg.norm(terms.delta))  # two rows of K, halved by the scale
      0.70710...
    """
    one = partial(_one_kernel, scale=jnp.asarray(scale, jnp.float32))
    with jax.default_matmul_precision("highest"):
        return each_matrix(one, lora_a.shape[:-2], lora_a, lora_b, kernel, emulated, moment)


@jax.jit
def _one_kernel(lora_a, lora_b, kernel, emulated, moment, *, scale) -> CorrectionTerms:
    basis, learned, live = _orthonormal(lora_a.astype(jnp.float32), lora_b.astype(jnp.float32))
    readable = jnp.where(live, basis, 0.0)  # arbitrary columns must not enter the solve
    if moment is None:
        delta = _error_seen(readable, kernel, emulated)
    else:
        seen = moment.astype(jnp.float32) @ readable
        gram = readable.T @ seen
        mean = jnp.trace(gram) / jnp.maximum(live.sum(), 1)
        ridge = jnp.where(live, RIDGE * mean, 1.0) + jnp.where(mean > 0, 0.0, 1.0)
        factor = jax.scipy.linalg.cho_factor(gram + jnp.diag(ridge))
        delta = jax.scipy.linalg.cho_solve(factor, _error_seen(seen, kernel, emulated))
    return CorrectionTerms(basis, learned, delta / scale, live)


def _error_seen(reader: jax.Array, kernel: jax.Array, emulated: Emulated) -> jax.Array:
    """Computes `readerᵀ (K - K_E)`, (rank, d_out)."""
    kernel = kernel.astype(jnp.float32)
    if isinstance(emulated, tuple):
        left, right = (factor.astype(jnp.float32) for factor in emulated)
        return reader.T @ kernel - (reader.T @ left) @ right
    # Subtract first: a kernel that was kept whole then gives an exact zero.
    return reader.T @ (kernel - emulated.astype(jnp.float32))


def _orthonormal(lora_a: jax.Array, lora_b: jax.Array):
    """Thin SVD of `lora_a` through QR: orthonormal basis, b', and which columns are read."""
    q, triangle = jnp.linalg.qr(lora_a)
    u, s, vt = jnp.linalg.svd(triangle, full_matrices=False)
    live = s > jnp.finfo(jnp.float32).eps * max(lora_a.shape) * s[0]
    missing = lora_a.shape[1] - s.shape[0]  # rank > d_in: keep the rank, since it fixes the scale
    basis = jnp.pad(q @ u, ((0, 0), (0, missing)))
    learned = jnp.pad((s[:, None] * vt) @ lora_b, ((0, missing), (0, 0)))
    return basis, learned, jnp.pad(live, (0, missing))
