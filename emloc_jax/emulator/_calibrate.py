"""Calibration: second moments of every kernel's traffic, in one compiled pass per batch."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax._compiling import loop_options
from emloc_jax.emulator._moments import SecondMoment
from emloc_jax.errors import NonFiniteError, NoTokensError, UnsupportedKernelError
from emloc_jax.kernels import KernelSpec, TappedKernel, get_leaf, intercept, set_leaves

__all__ = ["calibrate", "calibration_step", "zero_sums"]

logger = logging.getLogger(__name__)

Phantoms = dict[str, dict[str, jax.Array]]


def calibrate(
    fn: Callable[[Any, Any], Any],
    params: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    kernels: Mapping[str, KernelSpec],
    mask: Callable[[Any], Any] | None = None,
    gradients: bool = False,
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
        is false are not counted. None counts every token.
      gradients: measure output gradients as well, by a backward pass with frozen weights. They are
        `(d_out, d_out)`, so leave heads with a large vocabulary out of `kernels`.
      include_tied: measure tied embeddings too, in their role as head.
      on_batch: called with the number of batches done, for a progress bar.

    Returns:
      `{path: SecondMoment}` in the order of `kernels`.

    Raises:
      NoTokensError: there is no batch, all tokens are masked, or a kernel never ran.
      NonFiniteError: a sum is NaN or infinite; the message names its kernel.
      MaskShapeError: the mask does not fit the input of a kernel.
      UnsupportedKernelError: `kernels` holds no kernel that can be measured.

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
    specs = _measurable(kernels, include_tied)
    leaders = _leaders(specs)
    step = calibration_step(fn, specs, mask=mask, gradients=gradients)
    sums = zero_sums(specs, gradients=gradients)
    number = 0
    for batch in batches:
        sums = step(params, sums, batch)
        number += 1
        if on_batch is not None:
            jax.block_until_ready(sums)  # so that the caller sees what is done, not what is queued
            on_batch(number)
    if number == 0:
        raise NoTokensError("Calibration got no batch at all. Pass at least one batch.")
    _check(sums, number)
    return {
        path: SecondMoment(
            sum=sums[leaders[path]]["moment"],
            count=sums[leaders[path]]["count"],
            gradient=sums[path].get("gradient") if path in sums else None,
        )
        for path in specs
    }


def _measurable(kernels: Mapping[str, KernelSpec], include_tied: bool) -> dict[str, KernelSpec]:
    specs = {}
    for path, spec in kernels.items():
        if spec.handler is None:
            logger.info("Kernel '%s' is not calibrated: %s", path, spec.reason)
        elif spec.tied and not include_tied:
            logger.info("Kernel '%s' is not calibrated: it is a tied embedding.", path)
        else:
            specs[path] = spec
    if not specs:
        raise UnsupportedKernelError(
            f"None of the {len(kernels)} kernels given can be calibrated: they are tied embeddings "
            "or have no handler. Pass others, `include_tied=True`, or register a handler."
        )
    return specs


def _leaders(specs: Mapping[str, KernelSpec]) -> dict[str, str]:
    """For each kernel, the first one measured that reads the same input."""
    first: dict[str, str] = {}
    return {path: first.setdefault(spec.input_group, path) for path, spec in specs.items()}


def zero_sums(specs: Mapping[str, KernelSpec], *, gradients: bool) -> Phantoms:
    """What a calibration starts from: `{path: {moment, count, gradient}}`, those that are measured.

    Kernels that read the same input share the sums of the first.
    """
    leaders = _leaders(specs)
    sums: Phantoms = {}
    for path, spec in specs.items():
        stack, d_in, d_out = spec.stack_shape, spec.d_in, spec.d_out
        if leaders[path] == path:
            sums[path] = {"moment": jnp.zeros((*stack, d_in, d_in)), "count": jnp.zeros(stack)}
        if gradients:
            sums.setdefault(path, {})["gradient"] = jnp.zeros((*stack, d_out, d_out))
    return sums


def calibration_step(
    fn: Callable[[Any, Any], Any],
    specs: Mapping[str, KernelSpec],
    *,
    mask: Callable[[Any], Any] | None,
    gradients: bool,
) -> Callable[[Any, Phantoms, Any], Phantoms]:
    """A compiled `step(params, sums, batch) -> sums` that adds one batch and consumes its sums.

    Args:
      fn, mask, gradients: as for `calibrate`.
      specs: what to measure.
    """
    run = intercept(fn, allow_materialize=True)

    def step(params: Any, sums: Phantoms, batch: Any) -> Phantoms:
        tokens = None if mask is None else mask(batch)
        tokens = None if tokens is None else jnp.asarray(tokens, bool)

        def scalar(phantoms: Phantoms) -> jax.Array:
            taps = {}
            for path, own in phantoms.items():
                spec = specs[path]
                where = tokens
                if where is not None:  # `nn.scan` takes a slice per layer.
                    where = jnp.broadcast_to(where, (*spec.stack_shape, *where.shape))
                taps[path] = TappedKernel(
                    get_leaf(params, path), mask=where, layout=spec.layout, **own
                )
            outputs = run({"params": set_leaves(params, taps)}, batch)
            return _loss(outputs) if gradients else _any_scalar(outputs)

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


def _any_scalar(outputs: Any) -> jax.Array:
    """A scalar that depends on every output; which one does not matter to the input moments."""
    floats = [a for a in jax.tree.leaves(outputs) if jnp.issubdtype(a.dtype, jnp.inexact)]
    if not floats:
        raise ValueError("`fn` must return at least one array of floats, such as the logits.")
    return sum((jnp.sum(a.astype(jnp.float32)) for a in floats), jnp.float32(0))


def _check(sums: Phantoms, batches: int) -> None:
    finite = {p: [jnp.isfinite(a).all() for a in own.values()] for p, own in sums.items()}
    bad = [path for path, flags in jax.device_get(finite).items() if not all(flags)]
    if bad:
        raise NonFiniteError(
            f"The second moments of {_some(bad)} are not finite ({len(bad)} of {len(sums)}). "
            "Look for NaN or infinite weights or activations; mask padding that carries them."
        )
    counts = jax.device_get({p: own["count"] for p, own in sums.items() if "count" in own})
    empty = [path for path, count in counts.items() if (count == 0).any()]
    if empty:
        raise NoTokensError(
            f"In {batches} batches no token reached {_some(empty)} ({len(empty)} of {len(counts)} "
            "inputs). Either the mask is false everywhere, or `fn` does not run these kernels, or "
            "stops the gradient behind them; leave such kernels out of `kernels`."
        )


def _some(paths: list[str]) -> str:
    return ", ".join(f"'{path}'" for path in paths[:4]) + (" ..." if len(paths) > 4 else "")
