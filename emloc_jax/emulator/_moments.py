"""Second moments of what flows into a kernel and of the loss gradient at what flows out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emloc_jax.errors import MomentShapeError

__all__ = ["CompactMoment", "SecondMoment", "merge_moments", "moment_arrays", "moment_of_arrays"]


@struct.dataclass
class CompactMoment:
    """What factoring one kernel needs of a second moment on its larger side, in fp32.

    Of the moment `C (d, d)` at the larger side of a kernel `K`, seen as `(d, n)` with `n < d`, the
    factors depend only on `K^T C K` and, for the ridge, on the diagonal of `C`. So `n * n + d`
    numbers do for `d * d`. They are sums over tokens and can be added, but only for the kernel that
    they were measured with.

    Attributes:
      through: `sum y y^T` of rows that went through the kernel, `(*stack, n, n)`: `y = x K` for
        inputs `x`, `y = g K^T` for output gradients `g`.
      diagonal: `sum x_i^2` (or `g_i^2`), `(*stack, d)`.
    """

    through: jax.Array
    diagonal: jax.Array


@struct.dataclass
class SecondMoment:
    """Sums over calibration tokens, in fp32; sums, not means, so that they can be added.

    Kernels that read the same input hold the very same `sum` and `count` arrays (of a compact sum,
    the same `diagonal`).

    Attributes:
      sum: `sum x x^T` of input rows, `(*stack, d_in, d_in)`, not centred; or a `CompactMoment`.
      count: number of tokens, `(*stack,)`.
      gradient: `sum g g^T` of the loss gradient at output rows, `(*stack, d_out, d_out)`, or a
        `CompactMoment`; None if it was not measured.
    """

    sum: jax.Array | CompactMoment
    count: jax.Array
    gradient: jax.Array | CompactMoment | None = None


def merge_moments(
    first: Mapping[str, SecondMoment], *others: Mapping[str, SecondMoment]
) -> dict[str, SecondMoment]:
    """Second moments of several calibrations together, as if all batches had run in one.

    Compact ones must come from the same kernels, which cannot be checked here.

    Raises:
      MomentShapeError: they disagree in paths, in shapes, in form (full or compact), or in whether
        gradients were measured.

    Example:
      >>> import jax.numpy as jnp
      >>> part = {"kernel": SecondMoment(sum=jnp.eye(2), count=jnp.float32(3))}
      >>> float(merge_moments(part, part)["kernel"].count)
      6.0
    """
    merged = dict(first)
    for other in others:
        _check_same(merged, other)
        sums: dict[tuple[int, int], jax.Array] = {}  # Keeps shared arrays shared.

        def add(a: Any, b: Any, sums: dict[tuple[int, int], jax.Array] = sums) -> Any:
            return sums.setdefault((id(a), id(b)), jnp.add(a, b))

        merged = {path: jax.tree.map(add, moment, other[path]) for path, moment in merged.items()}
    return merged


def moment_arrays(moment: SecondMoment) -> dict[str, jax.Array]:
    """The arrays of a second moment by name: `sum`, `count`, `gradient`, or `sum.through` etc.

    Example:
      >>> import jax.numpy as jnp
      >>> compact = CompactMoment(through=jnp.eye(2), diagonal=jnp.ones(5))
      >>> list(moment_arrays(SecondMoment(compact, jnp.float32(3))))
      ['sum.through', 'sum.diagonal', 'count']
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(moment)
    return {
        jax.tree_util.keystr(place, simple=True, separator="."): array for place, array in leaves
    }


def moment_of_arrays(arrays: Mapping[str, jax.Array]) -> SecondMoment:
    """Inverse of `moment_arrays`.

    Raises:
      TypeError: a name that no second moment has, or one is lacking.
    """
    fields: dict[str, Any] = {}
    parts: dict[str, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        field, _, part = name.partition(".")
        if part:
            parts.setdefault(field, {})[part] = array
        else:
            fields[field] = array
    fields |= {field: CompactMoment(**own) for field, own in parts.items()}
    return SecondMoment(**fields)


def _check_same(first: Mapping[str, SecondMoment], other: Mapping[str, SecondMoment]) -> None:
    if first.keys() != other.keys():
        lacking = sorted(first.keys() ^ other.keys())
        raise MomentShapeError(
            f"Second moments of different kernels cannot be merged; only one side has {lacking[:3]}"
            f" ({len(lacking)} in all). Calibrate both with the same `kernels`."
        )
    for path, moment in first.items():
        shapes = [
            {name: array.shape for name, array in moment_arrays(m).items()}
            for m in (moment, other[path])
        ]
        if shapes[0] != shapes[1]:
            raise MomentShapeError(
                f"Second moments of '{path}' cannot be merged: they have shapes {shapes[0]} and "
                f"{shapes[1]}. Calibrate both alike (same model, same `gradients`, same `moments`)."
            )
