"""State and settings of `lsp_adamw`, and how a state begins."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from emloc_jax.errors import ConfigError
from emloc_jax.kernels import KernelSpec, flatten_leaves, is_box, match_rules, peel
from emloc_jax.offload._adam import AdamOptions, SubspaceMoments, init_moments
from emloc_jax.offload._fit_options import FitOptions
from emloc_jax.offload._pairs import Pair, check_pair

__all__ = ["Dense", "LspSettings", "LspState", "arrays", "init_state", "place", "rebuild"]

Choice = Literal["train", "freeze"]
Dense = Choice | Mapping[str, Choice] | Sequence[tuple[str, Choice]]


class LspState(NamedTuple):
    """State of `lsp_adamw`; all dictionaries are keyed by path.

    Attributes:
      count: int32 scalar, steps taken.
      skipped: int32 scalar, steps not taken because a gradient was not finite.
      projectors: (P, Q) for each compressed kernel.
      moments: Adam's moments `(*stack, s_in, s_out)` of each compressed kernel.
      dense: Adam's moments of each parameter that is trained whole.
      fitted: bool `(*stack,)`, whether a pair has been fitted or found good.
      errors: fp32 `(*stack,)`, estimation error at the last check; infinite before the first.
    """

    count: jax.Array
    skipped: jax.Array
    projectors: dict[str, Pair]
    moments: dict[str, SubspaceMoments]
    dense: dict[str, SubspaceMoments]
    fitted: dict[str, jax.Array]
    errors: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LspSettings:
    """What `lsp_adamw` was asked for."""

    learning_rate: Any
    kernels: Mapping[str, KernelSpec]  # only those to compress
    make_pairs: Callable[[], dict[str, Pair]]
    adam: AdamOptions
    fit: FitOptions
    refit_every: int | None
    clip: float | None
    normalize: bool
    dense: Dense
    decay_mask: Any
    memory_kind: str | None
    state_dtype: Any


def init_state(params: Any, settings: LspSettings) -> LspState:
    """The state before the first step; see `lsp_adamw` for what it raises."""
    flat = flatten_leaves(params)
    _check_kernels(flat, settings.kernels)
    others = [path for path in flat if path not in settings.kernels]
    trained = _trained(settings.dense, others)
    pairs = settings.make_pairs()
    moments, fitted, errors = {}, {}, {}
    for path, spec in settings.kernels.items():
        check_pair(spec, pairs[path])
        p, q = pairs[path]
        core = (spec.d_in if p is None else p.size, spec.d_out if q is None else q.size)
        moments[path] = init_moments((*spec.stack_shape, *core), settings.state_dtype)
        fitted[path] = jnp.zeros(spec.stack_shape, bool)
        errors[path] = jnp.full(spec.stack_shape, jnp.inf, jnp.float32)
    dense = {path: init_moments(peel(flat[path]).shape, settings.state_dtype) for path in trained}
    return LspState(
        count=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        projectors=pairs,
        moments=place(moments, settings.memory_kind, "rest"),
        dense=place(dense, settings.memory_kind, "rest"),
        fitted=fitted,
        errors=errors,
    )


def place(
    moments: dict[str, SubspaceMoments], memory_kind: str | None, when: Literal["rest", "work"]
) -> dict[str, SubspaceMoments]:
    """Puts mu and nu where they rest, or where they are worked on; counts stay on the device."""
    if memory_kind is None:
        return moments
    space = jax.memory.Space.Host if when == "rest" else jax.memory.Space.Device
    return {
        path: SubspaceMoments(
            mu=jax.device_put(m.mu, space), nu=jax.device_put(m.nu, space), count=m.count
        )
        for path, m in moments.items()
    }


def arrays(tree: Any) -> dict[str, jax.Array]:
    """{path: array}, with Flax's sharding metadata taken off."""
    return {path: peel(leaf) for path, leaf in flatten_leaves(tree).items()}


def rebuild(tree: Any, new: Mapping[str, jax.Array]) -> Any:
    """`tree` with its arrays replaced by path, sharding metadata put back."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=meta.is_axis_metadata)
    replaced = [
        leaf.replace_boxed(new[path]) if meta.is_axis_metadata(leaf) else new[path]
        for path, leaf in zip(flatten_leaves(tree), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, replaced)


def _check_kernels(flat: Mapping[str, Any], kernels: Mapping[str, KernelSpec]) -> None:
    for path, leaf in flat.items():
        if is_box(peel(leaf)):
            raise ConfigError(
                f"Parameter '{path}' is a boxed {type(peel(leaf)).__name__}; `lsp_adamw` trains "
                "arrays. Materialize the tree first, or train the box's own arrays as adapters."
            )
    for path, spec in kernels.items():
        if path not in flat:
            raise ConfigError(
                f"Kernel '{path}' is to be compressed but is not among the {len(flat)} parameters. "
                "`kernels` must come from `find_kernels` on this very tree (scanned and unrolled "
                "layers have other paths), and the tree must be the bare `params` collection."
            )
        shape = tuple(peel(flat[path]).shape)
        if shape != spec.shape:
            raise ConfigError(
                f"Kernel '{path}' has shape {shape} in the parameters and {spec.shape} in "
                "`kernels`. Call `find_kernels` on this model."
            )


def _trained(dense: Dense, others: list[str]) -> list[str]:
    if isinstance(dense, str):
        choices: dict[str, str] = dict.fromkeys(others, dense)
    else:
        choices = dict(match_rules(dense, others))
    for path in others:
        if choices.get(path) not in ("train", "freeze"):
            raise ConfigError(
                f"`dense` says {choices.get(path)!r} about parameter '{path}', which is not "
                "compressed; it must be 'train' or 'freeze'. Rules must cover every such "
                "parameter: add ('.*', 'freeze') or ('.*', 'train') at the end."
            )
    return [path for path in others if choices[path] == "train"]
