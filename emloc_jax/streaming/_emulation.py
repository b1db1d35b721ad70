"""What is asked of a streamed emulation, checked, and split by block."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from emloc_jax.checkpoints import Pretrained, base_fingerprint
from emloc_jax.emulator import MomentForm, Taps, candidates, compact_sides, ranks_for_rules
from emloc_jax.errors import ConfigError, NoTokensError, RatioError
from emloc_jax.kernels import KernelSpec
from emloc_jax.streaming._layer_kernels import LayerKernels, layer_kernels

__all__ = ["Emulation", "Rules", "emulation"]

Rules = float | Mapping[str, float] | Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Emulation:
    """A checked request.

    Attributes:
      base: the original model; its parameters may be abstract.
      kernels: of the model, by path.
      batches: of the calibration; none for plain SVD.
      weighting: `two_sided`, `one_sided` or `plain`.
      damping: see `factorize`.
      moments: see `calibrate`.
      chosen: the kernels that may be compressed, by path.
      others: why the others are not: `(status, reason)` by path; more may be added.
      ranks: by path, if ratios decide; None: they wait for all spectra.
      energy: see `compress`.
      budget: see `compress`.
      identity: JSON types that decide the result.
    """

    base: Pretrained
    kernels: Mapping[str, KernelSpec]
    batches: Sequence[Mapping[str, Any]]
    weighting: Any
    damping: float | None
    moments: MomentForm
    chosen: dict[str, KernelSpec]
    others: dict[str, tuple[str, str]]
    ranks: dict[str, int] | None
    energy: Rules | None
    budget: int | None
    identity: dict[str, Any]

    @property
    def scanned(self) -> bool:
        """Whether the layers are stacked."""
        return self.base.model.scan_layers

    @property
    def num_blocks(self) -> int:
        """L."""
        return self.base.config.num_layers

    @functools.cached_property
    def layers(self) -> list[LayerKernels]:
        """All the kernels, block by block."""
        return layer_kernels(self.kernels, self.num_blocks, scanned=self.scanned)

    def compressed(self, index: int, ranks: Mapping[str, int | None] | None) -> LayerKernels:
        """The kernels of a block that are factored: all candidates, or those that have a rank."""
        layer = self.layers[index]

        def wanted(path: str) -> bool:
            return path in self.chosen and (ranks is None or ranks.get(path) is not None)

        specs = {n: spec for n, spec in layer.specs.items() if wanted(layer.paths[n])}
        return LayerKernels(index, specs, layer.paths)

    def taps(self, index: int) -> Taps | None:
        """What is measured in a block; None if nothing is."""
        specs = self.layers[index].specs
        if self.weighting == "plain" or not specs:
            return None
        return Taps(specs, gradients=self.weighting == "two_sided", moments=self.moments)


def emulation(
    base: Pretrained,
    batches: Sequence[Mapping[str, Any]],
    *,
    kernels: Mapping[str, KernelSpec],
    ratios: Rules | None,
    energy: Rules | None,
    budget: int | None,
    skip: str | Sequence[str],
    weighting: str,
    damping: float | None,
    moments: MomentForm,
    chunk: int,
) -> Emulation:
    """Checks a request before anything is read; arguments are those of `stream_emulator`.

    Raises:
      ConfigError: an unknown weighting, or an unknown form of moments.
      NoTokensError: batches are needed, and there are none.
      RatioError, UnmatchedRuleError: see `compress`.
      UnsupportedKernelError: a kernel outside the blocks.
    """
    options = {"ratios": ratios, "energy": energy, "budget": budget}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise RatioError(
            "Pass exactly one of `ratios`, `energy` and `budget`; got "
            f"{' and '.join(given) or 'none'}."
        )
    if weighting not in ("two_sided", "one_sided", "plain"):
        raise ConfigError(
            f"weighting={weighting!r} is none of 'two_sided', 'one_sided' and 'plain'."
        )
    if weighting != "plain" and not len(batches):
        raise NoTokensError("Calibration got no batch at all. Pass at least one batch.")
    compact_sides({}, moments)  # refuses an unknown form
    chosen, others = candidates(kernels, skip=skip)
    ranks = None
    if ratios is not None:
        _, ranks = ranks_for_rules(ratios, chosen, others)
        chosen = {path: chosen[path] for path in ranks}
    identity = options | {
        "format": 1,
        "base": base_fingerprint(base),
        "dtypes": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(base.params)}),
        "compute_dtype": str(np.dtype(base.model.dtype)),
        "scan_layers": base.model.scan_layers,
        "kernels": list(kernels),
        "skip": [skip] if isinstance(skip, str) else list(skip),
        "weighting": weighting,
        "damping": damping,
        "moments": moments,
        "chunk": chunk,
        "data": None if weighting == "plain" else _digest(batches),
    }
    made = Emulation(
        base=base,
        kernels=kernels,
        batches=() if weighting == "plain" else batches,
        weighting=weighting,
        damping=damping,
        moments=moments,
        chosen=chosen,
        others=others,
        ranks=ranks,
        energy=energy,
        budget=budget,
        identity=identity,
    )
    if not any(layer.specs for layer in made.layers):
        raise ConfigError("There is no kernel to compress. Choose some with `kernels`.")
    return made


def _digest(batches: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            array = np.asarray(batch[name])
            digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
