"""Sparse projectors onto a subspace: data and construction."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from emloc_jax.errors import ProjectorError

__all__ = [
    "SparseProjector",
    "cache",
    "dense_projector",
    "identity_projector",
    "make_projector",
    "stack_projectors",
    "to_dense",
    "uncache",
    "with_values",
]


@struct.dataclass
class SparseProjector:
    """A matrix `(d, size)` with `nnz` distinct non-zeros in each row, balanced over columns.

    This is the (d, r)-sparse projector of LSP-Offload (arXiv 2406.10181, definition 1), with one
    addition: no column holds more than `m = ceil(d * nnz / size)` non-zeros. Hence products with
    the matrix and with its transpose are both gathers of a fixed size: neither needs a scatter.

    Attributes:
      indices: `(*stack, d, nnz)`, smallest unsigned integer that holds `size - 1`: column of each
        non-zero.
      values: `(*stack, d, nnz)`, fp32 or bf16.
      slots: `(*stack, size, m)`, smallest unsigned integer that holds `d * nnz`: the same
        non-zeros by column, as flat positions `row * nnz + k`; `d * nnz` is padding.
      cached: `(*stack, d, size)`, the dense matrix in the dtype of `values`, or None. When it is
        there, products are dense.
    """

    indices: jax.Array
    values: jax.Array
    slots: jax.Array
    cached: jax.Array | None = None

    @property
    def d(self) -> int:
        """Number of rows."""
        return self.indices.shape[-2]

    @property
    def size(self) -> int:
        """Number of columns: the size of the subspace."""
        return self.slots.shape[-2]

    @property
    def nnz(self) -> int:
        """Number of non-zeros in each row."""
        return self.indices.shape[-1]

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading axes, one projector for each index."""
        return self.indices.shape[:-2]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, a cached copy included."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def make_projector(
    seed: int | np.random.Generator,
    d: int,
    size: int,
    nnz: int,
    *,
    dtype: Any = jnp.float32,
    law: Literal["sign", "normal"] = "sign",
) -> SparseProjector:
    """Draws a projector with random balanced positions and random values.

    Values have mean zero and variance `1 / nnz`, so that `P P^T` is the identity in expectation.
    That makes the pair unbiased, not good: its error on a gradient is far above 1 until it is
    fitted. Drawn on the host, by numpy, so a seed gives the same projector on every device.

    Args:
      seed: a seed, or a generator to draw from.
      d: number of rows.
      size: number of columns.
      nnz: non-zeros per row, in distinct columns.
      dtype: of the values.
      law: `'sign'` for `+-1/sqrt(nnz)`, `'normal'` for `N(0, 1)/sqrt(nnz)`.

    Raises:
      ProjectorError: not `1 <= nnz <= size <= d`, or an unknown law.

    Example:
      >>> p = make_projector(0, d=6, size=4, nnz=2)
      >>> p.indices.shape, p.slots.shape, str(p.indices.dtype), p.nbytes
      ((6, 2), (4, 3), 'uint8', 72)
    """
    if not 1 <= nnz <= size <= d:
        raise ProjectorError(
            f"A projector of {d} rows was asked for with size={size} and nnz={nnz}. It needs "
            "1 <= nnz <= size <= rows: a row's non-zeros lie in distinct columns, and a subspace "
            "cannot be larger than the side it compresses (leave that side uncompressed instead)."
        )
    if law not in ("sign", "normal"):
        raise ProjectorError(
            f"The law {law!r} was asked for; a projector's values follow 'sign' or 'normal'."
        )
    rng = np.random.default_rng(seed)
    indices = _balanced_positions(rng, d, size, nnz)
    if law == "sign":
        values = rng.choice(np.array([-1.0, 1.0]), (d, nnz))
    else:
        values = rng.standard_normal((d, nnz))
    return _from_positions(indices, jnp.asarray(values / math.sqrt(nnz), dtype), size)


def identity_projector(
    d: int, permutation: Sequence[int] | np.ndarray | None = None, dtype: Any = jnp.float32
) -> SparseProjector:
    """The `(d, d)` identity, or the permutation matrix with ones at `(i, permutation[i])`.

    Example:
      >>> to_dense(identity_projector(3, [2, 0, 1]))
      Array([[0., 0., 1.],
             [1., 0., 0.],
             [0., 1., 0.]], dtype=float32)
    """
    columns = np.arange(d) if permutation is None else np.asarray(permutation)
    if sorted(columns.tolist()) != list(range(d)):
        raise ProjectorError(
            f"The {len(columns)} given positions are no permutation of 0 ... {d - 1}; give each of "
            "these numbers once."
        )
    return _from_positions(columns[:, None], jnp.ones((d, 1), dtype), d)


def dense_projector(matrix: Any) -> SparseProjector:
    """The projector of a full `(d, size)` matrix: every entry counts as a non-zero, and is cached.

    For comparisons, with singular vectors for instance; its positions take as much room as it does.

    Example:
      >>> p = dense_projector(jnp.array([[1.0], [2.0]]))
      >>> p.nnz, p.size, to_dense(p).tolist()
      (1, 1, [[1.0], [2.0]])
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim != 2 or not 1 <= matrix.shape[1] <= matrix.shape[0]:
        raise ProjectorError(
            f"A matrix of shape {matrix.shape} was given; a projector is (rows, size) with 1 <= "
            "size <= rows."
        )
    d, size = matrix.shape
    positions = np.broadcast_to(np.arange(size), (d, size))
    return cache(_from_positions(positions, matrix, size))


def stack_projectors(projectors: Sequence[SparseProjector]) -> SparseProjector:
    """One projector with a leading axis, as scanned kernels need.

    Raises:
      ProjectorError: none were given, or they differ in shape, dtype, or in being cached.
    """
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), p) for p in projectors]
    if not projectors or any(kind != kinds[0] for kind in kinds):
        raise ProjectorError(
            "Only projectors of equal rows, size, nnz and dtype, all cached or none, can be "
            f"stacked; given were {[(p.d, p.size, p.nnz) for p in projectors]}."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *projectors)


def to_dense(p: SparseProjector) -> jax.Array:
    """The matrix `(*stack, d, size)` in the dtype of the values."""
    if p.cached is not None:
        return p.cached
    return _dense(p.indices, p.values, p.size)


def with_values(p: SparseProjector, values: jax.Array) -> SparseProjector:
    """The same positions with other values `(*stack, d, nnz)`; a cached copy is refreshed."""
    if values.shape != p.values.shape:
        raise ProjectorError(
            f"Values of shape {values.shape} were given to a projector whose values have the shape "
            f"{p.values.shape}; give one for each of its non-zeros."
        )
    cached = None if p.cached is None else _dense(p.indices, values, p.size)
    return p.replace(values=values, cached=cached)  # pyright: ignore[reportAttributeAccessIssue]


def cache(p: SparseProjector) -> SparseProjector:
    """Adds the dense copy, which costs `d * size` values and makes products dense."""
    return p.replace(cached=to_dense(p))  # pyright: ignore[reportAttributeAccessIssue]


def uncache(p: SparseProjector) -> SparseProjector:
    """Drops the dense copy."""
    return p.replace(cached=None)  # pyright: ignore[reportAttributeAccessIssue]


def _balanced_positions(rng: np.random.Generator, d: int, size: int, nnz: int) -> np.ndarray:
    """Columns `(d, nnz)`, distinct in each row, with loads that differ by at most one.

    Random permutations of the columns follow one another and are cut into rows. Where a cut lies
    inside a row, the next permutation must not begin with what that row has already.
    """
    stream = np.empty(0, np.int64)
    while len(stream) < d * nnz:
        taken = stream[len(stream) // nnz * nnz :]  # the unfinished row
        order = rng.permutation(size)
        if len(taken):
            head = order[~np.isin(order, taken)][: nnz - len(taken)]
            rest = order[~np.isin(order, head)]  # still in random order, yet tied to `head`
            order = np.concatenate([head, rng.permutation(rest)])
        stream = np.concatenate([stream, order])
    rows = np.sort(stream[: d * nnz].reshape(d, nnz), axis=1)
    return rng.permutation(rows)  # rows that share a permutation would else be neighbours


def _from_positions(indices: np.ndarray, values: jax.Array, size: int) -> SparseProjector:
    """Adds the view by columns to positions `(d, nnz)`."""
    flat = indices.reshape(-1)
    order = np.argsort(flat, kind="stable")
    loads = np.bincount(flat, minlength=size)
    slots = np.full((size, loads.max()), flat.size, np.int64)
    slots[np.arange(loads.max()) < loads[:, None]] = order
    return SparseProjector(
        indices=jnp.asarray(indices, np.min_scalar_type(size - 1)),
        values=values,
        slots=jnp.asarray(slots, np.min_scalar_type(flat.size)),
    )


def _dense(indices: jax.Array, values: jax.Array, size: int) -> jax.Array:
    if indices.ndim > 2:
        return jax.vmap(_dense, in_axes=(0, 0, None))(indices, values, size)
    rows = jnp.arange(indices.shape[0])[:, None]
    zeros = jnp.zeros((indices.shape[0], size), values.dtype)
    return zeros.at[rows, indices.astype(jnp.int32)].set(values, unique_indices=True)
