"""Fresh pairs of projectors for chosen kernels."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from emloc_jax.errors import ProjectorError
from emloc_jax.kernels import (
    KernelSpec,
    SparseProjector,
    make_projector,
    match_rules,
    select,
    stack_projectors,
)

__all__ = ["Pair", "Subspace", "check_pair", "make_pairs", "subspace_sizes"]

Pair = tuple[SparseProjector | None, SparseProjector | None]
Number = int | float
Subspace = Number | Mapping[str, Number] | Sequence[tuple[str, Number]]


def subspace_sizes(
    kernels: Mapping[str, KernelSpec],
    *,
    where: str | Sequence[str],
    subspace: Subspace,
    nnz: int = 4,
    given: Mapping[str, Pair] | None = None,
) -> dict[str, tuple[int, int]]:
    """Sizes `(s_in, s_out)` of the subspace of each chosen kernel, checked before any work.

    Args:
      kernels: from `find_kernels`.
      where: regular expression(s) on whole paths: the kernels to compress.
      subspace: an int `s` for `(s, s)`; a float `f` in (0, 1] for `(f d_in, f d_out)`, rounded; or
        rules `(regex, int or float)`, which must cover all chosen kernels.
      nnz: non-zeros in each row.
      given: {path: (P, Q)} that will not be drawn; None in a pair leaves that side whole.

    Raises:
      ProjectorError: a kernel without a rule or too small for its subspace, a subspace too small
        for `nnz`, or a given pair that does not fit; names the path.
      UnmatchedRuleError: an expression matches no kernel.

    Example:
      >>> from emloc_jax.kernels import Layout
      >>> kernel = KernelSpec("up/kernel", "Dense", "Dense", "", Layout(), (), (16,), (64,),
      ...                     jnp.float32, "up/kernel")
      >>> subspace_sizes({"up/kernel": kernel}, where=".*", subspace=0.25)
      {'up/kernel': (4, 16)}
    """
    given = {} if given is None else given
    chosen = select(where, kernels)
    unknown = [path for path in given if path not in chosen]
    if unknown:
        raise ProjectorError(
            f"Projectors were given for '{unknown[0]}', which is not among the {len(chosen)} "
            "kernels to compress. Use whole paths, and let `where` choose them."
        )
    if isinstance(subspace, (int, float)):
        values = dict.fromkeys(chosen, subspace)
    else:
        values = match_rules(subspace, chosen)
    sizes = {}
    for path in chosen:
        spec = kernels[path]
        if path in given:
            check_pair(spec, given[path])
            p, q = given[path]
            sizes[path] = (spec.d_in if p is None else p.size, spec.d_out if q is None else q.size)
        elif path in values:
            sizes[path] = _sizes(spec, values[path], nnz)
        else:
            raise ProjectorError(
                f"No rule of `subspace` matches kernel '{path}', which `where` chose. Add a rule "
                "('.*', size) at the end, or leave the kernel out of `where`."
            )
    return sizes


def make_pairs(
    kernels: Mapping[str, KernelSpec],
    *,
    where: str | Sequence[str],
    subspace: Subspace,
    nnz: int = 4,
    seed: int = 0,
    dtype: Any = jnp.float32,
    law: Literal["sign", "normal"] = "sign",
    given: Mapping[str, Pair] | None = None,
) -> dict[str, Pair]:
    """A pair `(P, Q)` for each chosen kernel, unfitted except for those that are `given`.

    Positions are drawn on the host from `seed` and the path alone, so the choice of other kernels
    does not change them; the layers of a stacked kernel draw independently.

    Args:
      kernels: from `find_kernels`.
      where: regular expression(s) on whole paths.
      subspace: see `subspace_sizes`.
      nnz: non-zeros in each row.
      seed: of the draw.
      dtype: of the values.
      law: of the values, see `make_projector`.
      given: pairs to take instead, by path; None in place of a projector leaves that side whole.

    Returns:
      {path: (P, Q)} with the stack axes of the kernels.

    Raises:
      ProjectorError: a projector that cannot exist for its kernel, or a given one that does not
        fit; the message names the path.
      UnmatchedRuleError: an expression matches no kernel.
    """
    given = {} if given is None else given
    sizes = subspace_sizes(kernels, where=where, subspace=subspace, nnz=nnz, given=given)
    pairs: dict[str, Pair] = {}
    for path, (size_in, size_out) in sizes.items():
        if path in given:
            pairs[path] = given[path]
            continue
        spec, rng = kernels[path], _generator(seed, path)
        draw = functools.partial(_stacked, rng, spec.stack_shape, nnz=nnz, dtype=dtype, law=law)
        pairs[path] = (draw(d=spec.d_in, size=size_in), draw(d=spec.d_out, size=size_out))
    return pairs


def check_pair(spec: KernelSpec, pair: Pair) -> None:
    """Raises ProjectorError unless `pair` fits the kernel, stack axes included."""
    for projector, d, side in zip(pair, (spec.d_in, spec.d_out), ("input", "output"), strict=True):
        if projector is None:
            continue
        if projector.d != d or projector.stack_shape != spec.stack_shape:
            raise ProjectorError(
                f"Kernel '{spec.path}' needs a projector of {d} rows and stack axes "
                f"{spec.stack_shape} on its {side} side; given was one of {projector.d} rows and "
                f"stack axes {projector.stack_shape}."
            )


def _sizes(spec: KernelSpec, value: Number, nnz: int) -> tuple[int, int]:
    smaller = min(spec.d_in, spec.d_out)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ProjectorError(
            f"`subspace` for kernel '{spec.path}' is {value!r}; it must be a positive int (size) "
            "or a float in (0, 1] (fraction of each side)."
        )
    if isinstance(value, int):
        sizes = (value, value)
        if value > smaller:
            raise ProjectorError(
                f"A subspace of size {value} was asked for on kernel '{spec.path}' with "
                f"d_in={spec.d_in} and d_out={spec.d_out}. Choose at most {smaller}, or a fraction."
            )
    elif value > 1:
        raise ProjectorError(
            f"`subspace` is the float {value} for kernel '{spec.path}': a fraction lies in (0, 1]. "
            "Write an int for a size."
        )
    else:
        sizes = (max(1, round(value * spec.d_in)), max(1, round(value * spec.d_out)))
    if not 1 <= nnz <= min(sizes):
        raise ProjectorError(
            f"`nnz` is {nnz}, but kernel '{spec.path}' gets a subspace of sizes {sizes}: the "
            "non-zeros of a row lie in distinct columns. Choose 1 <= nnz <= size."
        )
    return sizes


def _generator(seed: int, path: str) -> np.random.Generator:
    digest = hashlib.sha256(path.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def _stacked(
    rng: np.random.Generator,
    stack: tuple[int, ...],
    *,
    d: int,
    size: int,
    nnz: int,
    dtype: Any,
    law: Literal["sign", "normal"],
) -> SparseProjector:
    if not stack:
        return make_projector(rng, d, size, nnz, dtype=dtype, law=law)
    options: Any = {"d": d, "size": size, "nnz": nnz, "dtype": dtype, "law": law}
    return stack_projectors([_stacked(rng, stack[1:], **options) for _ in range(stack[0])])
