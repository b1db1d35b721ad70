"""What the correction of each kernel works on, taken from the trees and checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.core import meta

from emloc_jax.adapters._adapter import Adapter
from emloc_jax.adapters._fit import fitting_leaves
from emloc_jax.adapters._terms import CorrectionTerms, Emulated, correction_terms
from emloc_jax.adapters._whole import Trainable, split_whole
from emloc_jax.errors import AdapterMismatchError, MomentShapeError, NonFiniteError
from emloc_jax.kernels import LowRankKernel, is_box, peel

__all__ = ["HasSum", "Problem", "problems"]


class HasSum(Protocol):
    """A second moment: anything with `sum` (*stack, d_in, d_in), such as a full `SecondMoment`."""

    @property
    def sum(self) -> Any:
        """The sum of x xᵀ over tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Problem:
    """One adapter with its original kernel, its emulated kernel and its second moment.

    Attributes:
      path: of the kernel.
      adapter: uncorrected.
      original: array in the layout of its module.
      emulated: `LowRankKernel`, or an array where the emulator kept the kernel whole.
      moment: (*stack, d_in, d_in) or None.
    """

    path: str
    adapter: Adapter
    original: Any
    emulated: Any
    moment: Any

    def matrices(self) -> tuple[jax.Array, Emulated]:
        """The original kernel (*stack, d_in, d_out), and the emulated one or its two factors."""
        layout, stack = self.adapter.layout, self.adapter.stack_shape
        kernel = layout.matrix(self.original)
        if not isinstance(self.emulated, LowRankKernel):
            return kernel, layout.matrix(self.emulated)
        left, right = meta.unbox((self.emulated.left, self.emulated.right))
        rank = left.shape[-1]
        return kernel, (left.reshape(*stack, -1, rank), right.reshape(*stack, rank, -1))

    def terms(self) -> CorrectionTerms:
        """The correction's matrices.

        Raises:
          NonFiniteError: an input holds a NaN or an infinity.
        """
        scale = self.adapter.scale
        terms = correction_terms(*self.adapter.matrices(), *self.matrices(), self.moment, scale)
        if not bool(jnp.isfinite(terms.learned).all() & jnp.isfinite(terms.delta).all()):
            raise NonFiniteError(
                f"The correction of '{self.path}' is not finite: its adapter, kernel, emulator or "
                "second moment holds a NaN or an infinity. Check that training and calibration "
                "stayed finite."
            )
        return terms


def problems(
    adapters: Mapping[str, Trainable],
    params: Mapping[str, Any],
    emulator: Mapping[str, Any],
    moments: Mapping[str, HasSum] | None,
) -> list[Problem]:
    """Pairs every adapter with its kernels; checks everything and computes nothing.

    What is trained whole must fit both trees, and is no problem.

    Raises:
      AdapterMismatchError: an adapter was corrected already, is missing a kernel on either side,
        or differs in shape; or a leaf is boxed where a plain kernel is needed.
      MomentShapeError: `moments` lacks a kernel, has another shape, or is compact.
    """
    lora, _ = split_whole(adapters)
    done = [path for path, adapter in lora.items() if adapter.corrected]
    if done:
        raise AdapterMismatchError(
            f"{len(done)} adapters were corrected already, the first is '{done[0]}'. A second "
            "correction would subtract the emulator's error twice; start from the adapters as "
            "training left them."
        )
    originals = fitting_leaves(params, adapters, name="the original parameters")
    emulated = fitting_leaves(emulator, adapters, name="the emulator")
    return [
        Problem(
            path,
            adapter,
            _original(path, peel(originals[path])),
            _emulated(path, peel(emulated[path])),
            None if moments is None else _moment(path, adapter, moments),
        )
        for path, adapter in lora.items()
    ]


def _original(path: str, kernel: Any) -> Any:
    if is_box(kernel):
        raise AdapterMismatchError(
            f"The correction needs the original kernel '{path}' as an array, but found a "
            f"{type(kernel).__name__}. Pass the full parameters, before `compress` and `attach`."
        )
    return kernel


def _emulated(path: str, kernel: Any) -> Any:
    if is_box(kernel) and not isinstance(kernel, LowRankKernel):
        raise AdapterMismatchError(
            f"The correction needs the emulator's kernel '{path}' as factors or as an array, but "
            f"found a {type(kernel).__name__}. Pass the emulator itself, without adapters or taps."
        )
    return kernel


def _moment(path: str, adapter: Adapter, moments: Mapping[str, HasSum]) -> Any:
    if path not in moments:
        raise MomentShapeError(
            f"The calibration-weighted correction needs a second moment of '{path}', but `moments` "
            "has none. Calibrate every adapted kernel, or pass `moments=None` for the plain form."
        )
    moment = moments[path].sum
    if hasattr(moment, "through"):
        raise MomentShapeError(
            f"The second moment of '{path}' is compact: it serves to factor that kernel, but the "
            "calibration-weighted correction needs it in full. Calibrate with moments='full', or "
            "pass `moments=None` for the plain form."
        )
    d_in = math.prod(adapter.in_shape)
    expected = (*adapter.stack_shape, d_in, d_in)
    if tuple(moment.shape) != expected:
        raise MomentShapeError(
            f"The second moment of '{path}' has shape {tuple(moment.shape)}; its kernel with "
            f"d_in={d_in} needs {expected}. The moments were taken on another model."
        )
    return moment
