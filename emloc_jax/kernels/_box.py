"""The common base of boxed kernels."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
from flax.core import meta
from jax.sharding import Mesh, PartitionSpec

__all__ = ["Box", "is_box", "is_leaf", "peel"]


class Box(meta.AxisMetadata[Any]):
    """A pytree node that stands where a kernel array was, and knows the array it stands for.

    Flax calls `unbox` inside `Module.param`, so every linen module computes the right result with
    a boxed kernel; `intercept` adds the fast path that never forms the array. The arrays of a box
    carry the stack axes of `nn.scan` and `nn.vmap` in front, as plain data.

    Against Flax's habit, the leaves of a box do not correspond to the unboxed value. Hence no code
    may zip a boxed tree with an unboxed one, and `replace_boxed` refuses.
    """

    # Whether `intercept` computes with the box; if not, every module unboxes it.
    fast: ClassVar[bool] = True

    def replace_boxed(self, val: Any) -> Self:
        """Refuses: a product of factors cannot be overwritten by an array."""
        raise TypeError(
            f"A {type(self).__name__} cannot be overwritten by an array; materialize it first."
        )

    def add_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """Passes the axis on to sharding metadata inside the box."""
        return self._map_fields(lambda field: meta.add_axis(field, index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """Passes the axis on to sharding metadata inside the box."""
        return self._map_fields(lambda field: meta.remove_axis(field, index, params))

    def get_partition_spec(self) -> Self:
        """A box of the same kind whose arrays are replaced by their partition specs."""
        return self._map_fields(_partition_specs)

    def get_sharding(self, mesh: Mesh) -> Self:
        """A box of the same kind whose arrays are replaced by their shardings on `mesh`."""
        return self._map_fields(
            lambda field: jax.tree.map(
                lambda spec: jax.sharding.NamedSharding(mesh, spec),
                _partition_specs(field),
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            )
        )

    def _map_fields(self, function: Any) -> Self:
        changed = {
            field.name: function(getattr(self, field.name))
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if field.metadata.get("pytree_node", True)
        }
        return dataclasses.replace(self, **changed)  # pyright: ignore[reportArgumentType]


def _partition_specs(field: Any) -> Any:
    """Replaces arrays by partition specs, replicated where no names were given."""

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, meta.AxisMetadata):
            return leaf.get_partition_spec()  # pyright: ignore[reportAttributeAccessIssue]
        return PartitionSpec()

    return jax.tree.map(spec, field, is_leaf=meta.is_axis_metadata)


def is_box(value: Any) -> bool:
    """Whether `value` is a boxed kernel of this library (sharding metadata around it is not)."""
    return isinstance(value, Box)


def is_leaf(value: Any) -> bool:
    """Whether `value` counts as one leaf of a parameter tree: a box or Flax sharding metadata."""
    return isinstance(value, meta.AxisMetadata)


def peel(value: Any) -> Any:
    """Strips Flax sharding metadata from the outside, leaving a box or an array."""
    while isinstance(value, meta.AxisMetadata) and not isinstance(value, Box):
        value = value.unbox()
    return value
