"""Second moments of what flows into a kernel and of the loss gradient at what flows out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emloc_jax.errors import MomentShapeError

__all__ = ["SecondMoment", "merge_moments"]


@struct.dataclass
class SecondMoment:
    """Sums over calibration tokens, in fp32; sums, not means, so that they can be added.

    Kernels that read the same input hold the very same `sum` and `count` arrays.

    Attributes:
      sum: `sum x x^T` of input rows, `(*stack, d_in, d_in)`; not centred.
      count: number of tokens, `(*stack,)`.
      gradient: `sum g g^T` of the loss gradient at output rows, `(*stack, d_out, d_out)`; None if
        it was not measured.
    """

    sum: jax.Array
    count: jax.Array
    gradient: jax.Array | None = None


def merge_moments(
    first: Mapping[str, SecondMoment], *others: Mapping[str, SecondMoment]
) -> dict[str, SecondMoment]:
    """Second moments of several calibrations together, as if all batches had run in one.

    Raises:
      MomentShapeError: they disagree in paths, in shapes, or in whether gradients were measured.

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
            if a is None:
                return None
            return sums.setdefault((id(a), id(b)), jnp.add(a, b))

        merged = {
            path: SecondMoment(
                sum=add(moment.sum, other[path].sum),
                count=add(moment.count, other[path].count),
                gradient=add(moment.gradient, other[path].gradient),
            )
            for path, moment in merged.items()
        }
    return merged


def _check_same(first: Mapping[str, SecondMoment], other: Mapping[str, SecondMoment]) -> None:
    if first.keys() != other.keys():
        lacking = sorted(first.keys() ^ other.keys())
        raise MomentShapeError(
            f"Second moments of different kernels cannot be merged; only one side has {lacking[:3]}"
            f" ({len(lacking)} in all). Calibrate both with the same `kernels`."
        )
    for path, moment in first.items():
        shapes = [
            tuple(None if a is None else a.shape for a in (m.sum, m.count, m.gradient))
            for m in (moment, other[path])
        ]
        if shapes[0] != shapes[1]:
            raise MomentShapeError(
                f"Second moments of '{path}' cannot be merged: (sum, count, gradient) have shapes "
                f"{shapes[0]} and {shapes[1]}. Calibrate both alike (same model, same `gradients`)."
            )
