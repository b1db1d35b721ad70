"""Calibration: second moments of every kernel's traffic, in one compiled pass per batch."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax._compiling import loop_options
from emloc_jax.emulator._moment_forms import MomentForm
from emloc_jax.emulator._moments import SecondMoment
from emloc_jax.emulator._taps import Sums, Taps
from emloc_jax.errors import NoTokensError
from emloc_jax.kernels import KernelSpec, intercept

__all__ = ["any_scalar", "calibrate", "calibration_step"]


def calibrate(
    fn: Callable[[Any, Any], Any],
    params: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    kernels: Mapping[str, KernelSpec],
    mask: Callable[[Any], Any] | None = None,
    gradients: bool = False,
    moments: MomentForm = "auto",
    include_tied: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, SecondMoment]:
    """Sums `x x^T` over the input rows of every kernel, and `g g^T` over its output gradients.

    The model runs with its own kernels (errors of compression do not enter) and with intercepted
    modules, so `fn` may be `model.apply` itself. Kernels that read the same input share one sum.
    Batches of equal shapes share one compiled program; the accumulators are donated to it.

    Args:
      fn: `fn(variables, batch) -> outputs`, any pytree with a float in it. With `gradients=True` it
        returns the scalar loss, *summed* over tokens.
      params: parameters, as in `variables = {"params": params}`.
      batches: what `fn` is called on; each a pytree of arrays.
      kernels: what to measure, by path, from `find_kernels`. Kernels without a handler are left out
        (and logged); so are tied embeddings.
      mask: `mask(batch)` gives a boolean array with the token axes of the inputs; tokens where it
        is false are not counted. None counts every token. Where some kernels read patches and
        others words, it gives `{regular expression: array}`; a kernel takes the first that matches
        its whole path, and counts every token if none does.
      gradients: measure output gradients as well, by a backward pass with frozen weights.
      moments: `full` keeps `(d_in, d_in)` and `(d_out, d_out)` of every kernel (leave heads with a
        large vocabulary out of `kernels` then). `compact` keeps of the larger side only what
        factoring that kernel needs, a `CompactMoment` of about the size of the smaller side
        squared. The factors are the same up to rounding: their error is within 1.001 of the optimum
        while the optimal relative error is above about 5e-3 (see `factorize`). The
        calibration-weighted correction needs full input moments, and compact ones serve no other
        kernel. `auto` is compact for sides wider than 4096, where a full moment takes more than
        64 MiB, and full elsewhere. Kernels that read one input are compact together, or share one
        full sum if one of them needs it or that is smaller.
      include_tied: measure tied embeddings too, in their role as head.
      on_batch: called with the number of batches done, for a progress bar.

    Returns:
      `{path: SecondMoment}` in the order of `kernels`.

    Raises:
      NoTokensError: there is no batch, all tokens are masked, or a kernel never ran.
      NonFiniteError: a sum is NaN or infinite; the message names its kernel.
      MaskShapeError: the mask does not fit the input of a kernel.
      UnsupportedKernelError: `kernels` holds no kernel that can be measured.
      ConfigError: `moments` is none of the three.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import find_kernels
      >>> model, x = nn.Dense(3), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> kernels = find_kernels(model.apply, params, x)
      >>> moments = calibrate(model.apply, params, [x, x], kernels=kernels)
      >>> print(moments["kernel"].sum, moments["kernel"].count)
      [[20. 28.]
       [28. 40.]] 4.0
    """
    taps = Taps(kernels, gradients=gradients, moments=moments, include_tied=include_tied)
    step = calibration_step(fn, taps, mask=mask)
    sums = taps.zeros()
    number = 0
    for batch in batches:
        sums = step(params, sums, batch)
        number += 1
        if on_batch is not None:
            jax.block_until_ready(sums)  # so that the caller sees what is done, not what is queued
            on_batch(number)
    if number == 0:
        raise NoTokensError("Calibration got no batch at all. Pass at least one batch.")
    taps.check(sums, number)
    return taps.moments(sums)


def calibration_step(
    fn: Callable[[Any, Any], Any], taps: Taps, *, mask: Callable[[Any], Any] | None
) -> Callable[[Any, Sums, Any], Sums]:
    """A compiled `step(params, sums, batch) -> sums` that adds one batch and consumes its sums.

    Args:
      fn: as for `calibrate`; the loss if `taps` measure gradients.
      taps: what is measured.
      mask: as for `calibrate`.
    """
    run = intercept(fn, allow_materialize=True)

    def step(params: Any, sums: Sums, batch: Any) -> Sums:
        tokens = None if mask is None else mask(batch)
        tokens = jax.tree.map(lambda part: jnp.asarray(part, bool), tokens)

        def scalar(phantoms: Sums) -> jax.Array:
            outputs = run({"params": taps.attach(params, phantoms, tokens)}, batch)
            return _loss(outputs) if taps.gradients else any_scalar(outputs)

        cotangents = jax.grad(scalar)(jax.tree.map(jnp.zeros_like, sums))
        return jax.tree.map(jnp.add, sums, cotangents)

    return jax.jit(step, donate_argnums=1, compiler_options=loop_options())


def _loss(outputs: Any) -> jax.Array:
    if not hasattr(outputs, "shape") or outputs.shape != ():
        found = getattr(outputs, "shape", type(outputs).__name__)
        raise ValueError(
            "With `gradients=True`, `fn` must return the scalar loss summed over tokens, but it "
            f"returned {found}."
        )
    return outputs.astype(jnp.float32)


def any_scalar(outputs: Any) -> jax.Array:
    """A scalar that depends on every output; which one does not matter to the input moments."""
    floats = [a for a in jax.tree.leaves(outputs) if jnp.issubdtype(a.dtype, jnp.inexact)]
    if not floats:
        raise ValueError("`fn` must return at least one array of floats, such as the logits.")
    return sum((jnp.sum(a.astype(jnp.float32)) for a in floats), jnp.float32(0))
