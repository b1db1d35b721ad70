"""Taps on the kernels of a model, or of one block of it, and the sums that they fill."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.emulator._moment_forms import MomentForm, compact_sides
from emloc_jax.emulator._moments import CompactMoment, SecondMoment
from emloc_jax.errors import NonFiniteError, NoTokensError, UnsupportedKernelError
from emloc_jax.kernels import KernelSpec, TappedKernel, get_leaf, set_leaves

__all__ = ["Sums", "Taps"]

logger = logging.getLogger(__name__)

Sums = dict[str, dict[str, jax.Array]]


class Taps:
    """What is measured at which kernels. Kernels that read the same input share one sum.

    The sums are zeros of the shapes that the taps' cotangents have: `attach` puts them into the
    parameters, and their gradient through the model is what one batch adds.

    Args:
      kernels: what to measure, by path in the parameters that are tapped. Kernels without a handler
        are left out (and logged); so are tied embeddings.
      gradients: measure output gradients as well.
      moments: which are kept whole and which compact; see `calibrate`.
      include_tied: measure tied embeddings too.

    Attributes:
      specs: the kernels that are measured.
      leaders: for each of them, the first that reads the same input and holds its sum.
      gradients: as given.
      compact: the kernels whose input or gradient moments are compact.

    Raises:
      UnsupportedKernelError: `kernels` holds no kernel that can be measured.
      ConfigError: `moments` is no such form.

    Example:
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import find_kernels
      >>> model, x = nn.Dense(3), jnp.ones((1, 2))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> taps = Taps(find_kernels(model.apply, params, x))
      >>> jax.tree.map(jnp.shape, taps.zeros())
      {'kernel': {'count': (), 'moment': (2, 2)}}
    """

    def __init__(
        self,
        kernels: Mapping[str, KernelSpec],
        *,
        gradients: bool = False,
        moments: MomentForm = "auto",
        include_tied: bool = False,
    ):
        self.specs = _measurable(kernels, include_tied)
        self.gradients = gradients
        self.compact = compact_sides(self.specs, moments)
        first: dict[str, str] = {}
        self.leaders = {p: first.setdefault(spec.input_group, p) for p, spec in self.specs.items()}

    def zeros(self) -> Sums:
        """Sums before the first batch."""
        sums: Sums = {}
        for path, spec in self.specs.items():
            stack, d_in, d_out = spec.stack_shape, spec.d_in, spec.d_out
            own: dict[str, jax.Array] = {}
            compact = path in self.compact.inputs
            if self.leaders[path] == path:
                shared = {"diagonal": (d_in,)} if compact else {"moment": (d_in, d_in)}
                own |= {name: jnp.zeros((*stack, *shape)) for name, shape in shared.items()}
                own["count"] = jnp.zeros(stack)
            if compact:
                own["through"] = jnp.zeros((*stack, d_out, d_out))
            if self.gradients and path in self.compact.gradients:
                own["gradient_through"] = jnp.zeros((*stack, d_in, d_in))
                own["gradient_diagonal"] = jnp.zeros((*stack, d_out))
            elif self.gradients:
                own["gradient"] = jnp.zeros((*stack, d_out, d_out))
            if own:
                sums[path] = own
        return sums

    def attach(
        self, params: Any, phantoms: Sums, tokens: jax.Array | Mapping[str, jax.Array] | None
    ) -> Any:
        """The parameters with taps that carry `phantoms`.

        Args:
          params: of the model or the block.
          phantoms: zeros, as from `zeros`.
          tokens: bool with the token axes of the inputs, true where a token counts; None: all do.
            Where kernels have other token axes than others (patches, words), one of each by regular
            expression: a kernel takes the first that matches its whole path, or counts all tokens.
        """
        taps = {}
        for path, own in phantoms.items():
            spec = self.specs[path]
            where = _mask_of(tokens, path)
            if where is not None:  # `nn.scan` takes a slice per layer.
                where = jnp.broadcast_to(where, (*spec.stack_shape, *where.shape))
            taps[path] = TappedKernel(get_leaf(params, path), mask=where, layout=spec.layout, **own)
        return set_leaves(params, taps)

    def check(self, sums: Sums, batches: int, within: str = "") -> None:
        """Refuses sums that are not finite, and inputs that no token reached.

        Args:
          sums: after all batches.
          batches: how many there were.
          within: what to put before the paths in messages, `layers/3/` say.

        Raises:
          NonFiniteError, NoTokensError: see `calibrate`.
        """
        finite = {p: [jnp.isfinite(a).all() for a in own.values()] for p, own in sums.items()}
        bad = [within + path for path, flags in jax.device_get(finite).items() if not all(flags)]
        if bad:
            raise NonFiniteError(
                f"The second moments of {_some(bad)} are not finite ({len(bad)} of {len(sums)}). "
                "Look for NaN or infinite weights or activations; mask padding that carries them."
            )
        counts = jax.device_get({p: own["count"] for p, own in sums.items() if "count" in own})
        empty = [within + path for path, count in counts.items() if (count == 0).any()]
        if empty:
            raise NoTokensError(
                f"In {batches} batches no token reached {_some(empty)} ({len(empty)} of "
                f"{len(counts)} inputs). Either the mask is false everywhere, or `fn` does not run "
                "these kernels, or stops the gradient behind them; leave such kernels out of "
                "`kernels`."
            )

    def moments(self, sums: Sums) -> dict[str, SecondMoment]:
        """The sums as second moments, by path."""
        return {
            path: self._moment(path, sums.get(path, {}), sums[self.leaders[path]])
            for path in self.specs
        }

    def _moment(
        self, path: str, own: dict[str, jax.Array], shared: dict[str, jax.Array]
    ) -> SecondMoment:
        inputs, gradient = shared.get("moment"), own.get("gradient")
        if path in self.compact.inputs:
            inputs = CompactMoment(own["through"], shared["diagonal"])
        if "gradient_through" in own:
            gradient = CompactMoment(own["gradient_through"], own["gradient_diagonal"])
        assert inputs is not None
        return SecondMoment(inputs, shared["count"], gradient)


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


def _mask_of(tokens: Any, path: str) -> jax.Array | None:
    if not isinstance(tokens, Mapping):
        return tokens
    return next((mask for rule, mask in tokens.items() if re.fullmatch(rule, path)), None)


def _some(paths: list[str]) -> str:
    return ", ".join(f"'{path}'" for path in paths[:4]) + (" ..." if len(paths) > 4 else "")
