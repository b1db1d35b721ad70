"""The kernels of one block, of a model whose layers are scanned or not."""

import dataclasses
from collections.abc import Mapping

from emloc_jax.errors import CheckpointError, UnsupportedKernelError
from emloc_jax.kernels import KernelSpec

__all__ = ["LayerKernels", "layer_kernels"]


@dataclasses.dataclass(frozen=True)
class LayerKernels:
    """What one block has of the kernels that were asked for.

    Attributes:
      index: of the block.
      specs: by path inside the block, without the stack of the layers.
      paths: path in the model's tree by path inside the block.
    """

    index: int
    specs: dict[str, KernelSpec]
    paths: dict[str, str]

    def full(self, name: str) -> str:
        """The unrolled path of a kernel, for messages and trees of this block alone."""
        return f"layers/{self.index}/{name}"

    def full_specs(self, names: list[str] | None = None) -> dict[str, KernelSpec]:
        """`specs` by their unrolled paths."""
        chosen = self.specs if names is None else {name: self.specs[name] for name in names}
        return {
            self.full(name): dataclasses.replace(
                spec, path=self.full(name), input_group=self.full(spec.input_group)
            )
            for name, spec in chosen.items()
        }


def layer_kernels(
    kernels: Mapping[str, KernelSpec], num_layers: int, *, scanned: bool
) -> list[LayerKernels]:
    """Splits kernels by block.

    Args:
      kernels: of the model, by path.
      num_layers: L.
      scanned: the layers' kernels are stacked.

    Raises:
      UnsupportedKernelError: a kernel outside the blocks.
      CheckpointError: the stacks do not have that many layers.
    """
    outside = [path for path in kernels if not path.startswith("layers/")]
    if outside:
        raise UnsupportedKernelError(
            f"'{outside[0]}' lies outside the blocks, and a model that is read a block at a time "
            "has only its blocks compressed. Leave it out of `where`, or build in memory "
            "(stream=false)."
        )
    return [_layer(kernels, index, num_layers, scanned) for index in range(num_layers)]


def _layer(
    kernels: Mapping[str, KernelSpec], index: int, num_layers: int, scanned: bool
) -> LayerKernels:
    prefix = "layers/" if scanned else f"layers/{index}/"
    specs, paths = {}, {}
    for path, spec in kernels.items():
        if not path.startswith(prefix):
            continue
        if scanned and spec.stack_shape != (num_layers,):
            raise CheckpointError(
                f"'{path}' is a stack of {spec.stack_shape} kernels, but the model has "
                f"{num_layers} blocks. Take the kernels of this model, from `find_kernels`."
            )
        name = path.removeprefix(prefix)
        paths[name] = path
        specs[name] = dataclasses.replace(
            spec, path=name, stack_shape=(), input_group=spec.input_group.removeprefix(prefix)
        )
    return LayerKernels(index, specs, paths)
