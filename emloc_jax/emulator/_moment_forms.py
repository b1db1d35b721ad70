"""Which second moments are kept whole, and which only as far as their kernel needs them."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from emloc_jax.errors import ConfigError
from emloc_jax.kernels import KernelSpec

__all__ = ["AUTO_WIDTH", "CompactSides", "MomentForm", "compact_sides"]

MomentForm = Literal["auto", "full", "compact"]

# A moment this wide takes 64 MiB. Below, full ones are cheap, resolve smaller errors, and serve the
# calibration-weighted correction too; beyond, they are what limits the memory of a calibration.
AUTO_WIDTH = 4096


class CompactSides(NamedTuple):
    """Paths of kernels whose moment is compact, of inputs and of output gradients."""

    inputs: frozenset[str]
    gradients: frozenset[str]


def compact_sides(kernels: Mapping[str, KernelSpec], moments: MomentForm) -> CompactSides:
    """Decides the form of every moment, from shapes alone.

    Only the larger side of a kernel can be compact: inputs where `d_in > d_out`, output gradients
    where `d_out > d_in`. Kernels that read the same input share one full sum, so they take the
    compact form together, and only if all can and it is smaller in total. `auto` takes it, if it
    can, for sides wider than `AUTO_WIDTH`.

    Args:
      kernels: what is measured, by path.
      moments: `full`, `compact` or `auto`.

    Raises:
      ConfigError: another word.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import find_kernels
      >>> model, x = nn.Dense(2), jnp.ones((1, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> sorted(compact_sides(find_kernels(model.apply, params, x), "compact").inputs)
      ['kernel']
    """
    if moments not in ("auto", "full", "compact"):
        raise ConfigError(f"moments={moments!r} is none of 'auto', 'full' and 'compact'.")
    if moments == "full":
        return CompactSides(frozenset(), frozenset())
    floor = AUTO_WIDTH if moments == "auto" else 0
    groups: dict[str, list[str]] = {}
    for path, spec in kernels.items():
        groups.setdefault(spec.input_group, []).append(path)
    inputs = []
    for paths in groups.values():
        specs = [kernels[path] for path in paths]
        width, outs = specs[0].d_in, [spec.d_out for spec in specs]
        smaller = sum(n * n for n in outs) + width < width * width
        if width > floor and max(outs) < width and smaller:
            inputs += paths
    gradients = [p for p, spec in kernels.items() if floor < spec.d_out > spec.d_in]
    return CompactSides(frozenset(inputs), frozenset(gradients))
