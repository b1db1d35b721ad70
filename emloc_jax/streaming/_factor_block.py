"""The kernels of one block factored, as arrays for a file."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.checkpoints import stacked_sample
from emloc_jax.emulator import (
    CompactMoment,
    Factorization,
    SecondMoment,
    error_squares,
    factorize_kernels,
    moment_arrays,
    truncate,
)
from emloc_jax.kernels import KernelSpec, get_leaf, peel
from emloc_jax.streaming._arrays_file import ArraysFile
from emloc_jax.streaming._layer_kernels import LayerKernels

__all__ = ["Arrays", "factor_block", "finish_block", "moment_samples"]

Arrays = dict[str, np.ndarray]


def factor_block(
    layer: LayerKernels,
    params: Any,
    moments: Mapping[str, SecondMoment] | None,
    *,
    weighting: Any,
    damping: float | None,
    ranks: Mapping[str, int] | None,
) -> Arrays:
    """Factors the kernels of a block, one at a time.

    Args:
      layer: the kernels to factor.
      params: of the block.
      moments: by path inside the block; None for plain SVD.
      weighting: see `compress`.
      damping: see `factorize`.
      ranks: by path inside the block; None: not known yet.

    Returns:
      By name inside the block: with ranks `NAME:left` and `NAME:right` as an emulator stores them,
      `NAME:squares` and `NAME:errors`. Without, all factors up to the break-even rank in fp32, and
      `NAME:moment`, once for kernels that share it, or `NAME:through` and `NAME:diagonal` of a
      compact one, for `finish_block`.

    Raises:
      MomentShapeError, NoTokensError, NonFiniteError: see `factorize_kernels`.
    """
    tree = {"layers": {str(layer.index): params}}
    own = None if moments is None else {layer.full(n): m for n, m in moments.items()}
    arrays: Arrays = {}
    for name, (path, spec) in zip(layer.specs, layer.full_specs().items(), strict=True):
        full = factorize_kernels(
            tree,
            own,
            kernels={path: spec},
            weighting=weighting,
            damping=damping,
            max_ranks=None if ranks is None else {path: ranks[name]},
        )[path]
        moment = None if moments is None else moments[name].sum
        arrays[f"{name}:squares"] = np.asarray(full.squares)
        if ranks is not None:
            arrays |= _stored(tree, name, spec, full, ranks[name], moment)
            continue
        arrays[f"{name}:left"], arrays[f"{name}:right"] = (
            np.asarray(full.left),
            np.asarray(full.right),
        )
        if isinstance(moment, CompactMoment):
            arrays[f"{name}:through"] = np.asarray(moment.through)
            arrays[f"{name}:diagonal"] = np.asarray(moment.diagonal)
        elif moment is not None:
            arrays.setdefault(f"{_holder(spec, layer)}:moment", np.asarray(moment))
    return arrays


def finish_block(
    layer: LayerKernels, params: Any, kept: ArraysFile, ranks: Mapping[str, int], weighting: str
) -> Arrays:
    """What `factor_block` with ranks gives, from what it gave without them.

    Args:
      layer: the kernels that have a rank.
      params: of the block.
      kept: the file of what `factor_block` gave.
      ranks: by path inside the block.
      weighting: that was used.
    """
    tree = {"layers": {str(layer.index): params}}
    arrays: Arrays = {}
    for name, spec in zip(layer.specs, layer.full_specs().values(), strict=True):
        left, right, squares = (
            jnp.asarray(kept.read(f"{name}:{field}")) for field in ("left", "right", "squares")
        )
        full = Factorization(left, right, squares, weighting)
        moment = None
        if weighting != "plain":
            moment = _kept_moment(kept, name, _holder(spec, layer))
        arrays[f"{name}:squares"] = np.asarray(squares)
        arrays |= _stored(tree, name, spec, full, ranks[name], moment)
    return arrays


def moment_samples(
    moments: Mapping[str, SecondMoment], index: int, count: int
) -> dict[str, np.ndarray]:
    """What the fingerprint of all second moments takes of those of one block.

    Args:
      moments: by path inside the block.
      index: of the block in the stack.
      count: layers in the stack; 1 if they are not stacked.

    Returns:
      `NAME:FIELD:sample` uint8 for every field of `moment_arrays`, and `NAME:count`.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, moment in moments.items():
        for field, value in moment_arrays(moment).items():
            sample = stacked_sample(np.asarray(value), index, count)
            arrays[f"{name}:{field}:sample"] = np.frombuffer(sample, np.uint8)
        arrays[f"{name}:count"] = np.asarray(moment.count)
    return arrays


def _stored(
    tree: Any,
    name: str,
    spec: KernelSpec,
    full: Factorization,
    rank: int,
    moment: jax.Array | CompactMoment | None,
) -> Arrays:
    cut = truncate(tree, {spec.path: full}, {spec.path: rank}, kernels={spec.path: spec})
    box = get_leaf(cut, spec.path)
    left, right = peel(box.left), peel(box.right)
    kernel = spec.layout.matrix(jnp.asarray(peel(get_leaf(tree, spec.path))))
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    errors = error_squares(
        kernel, left.reshape(spec.d_in, rank), right.reshape(rank, spec.d_out), moment
    )
    return {
        f"{name}:left": np.asarray(left),
        f"{name}:right": np.asarray(right),
        f"{name}:errors": np.asarray(errors),
    }


def _kept_moment(kept: ArraysFile, name: str, holder: str) -> jax.Array | CompactMoment:
    if f"{name}:through" in kept:
        parts = (jnp.asarray(kept.read(f"{name}:{part}")) for part in ("through", "diagonal"))
        return CompactMoment(*parts)
    return jnp.asarray(kept.read(f"{holder}:moment"))


def _holder(spec: KernelSpec, layer: LayerKernels) -> str:
    """Name inside the block of the kernel whose input moment this one shares."""
    return spec.input_group.removeprefix(layer.full(""))
