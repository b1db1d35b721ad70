"""One step of `lsp_adamw`, traced inside the user's own program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emloc_jax.errors import ConfigError
from emloc_jax.kernels import flatten_leaves, lift_matrix, project_matrix
from emloc_jax.offload._adam import adam_direction, all_finite
from emloc_jax.offload._lsp_state import LspSettings, LspState, arrays, place, rebuild
from emloc_jax.offload._refit import Watched, carry, check_all
from emloc_jax.offload._step_scale import step_scale

__all__ = ["lsp_step"]

Arrays = dict[str, jax.Array]


def lsp_step(
    updates: Any,
    state: LspState,
    params: Any,
    settings: LspSettings,
    *,
    refit_gradients: Any,
    refit: Any,
) -> tuple[Any, LspState]:
    """Updates for all parameters, and the next state."""
    gradients = arrays(updates)
    weights = None if params is None else arrays(params)
    if settings.adam.weight_decay and weights is None:
        raise ValueError(
            "Weight decay needs the parameters: call `update(updates, state, params)`."
        )
    matrices = _matrices(gradients, settings)
    calibration = matrices
    if refit_gradients is not None:
        calibration = _matrices(_calibration(refit_gradients, settings), settings)
    due = _due(state, settings, refit)
    used = (matrices, {path: gradients[path] for path in state.dense})
    finite = all_finite(used) & (~_any(due) | all_finite(calibration))

    state = state._replace(
        moments=place(state.moments, settings.memory_kind, "work"),
        dense=place(state.dense, settings.memory_kind, "work"),
    )

    def take() -> tuple[Arrays, LspState]:
        return _take(gradients, matrices, calibration, weights, state, settings, due)

    def skip() -> tuple[Arrays, LspState]:
        zeros = {path: jnp.zeros_like(g) for path, g in gradients.items()}
        return zeros, state._replace(skipped=optax.safe_increment(state.skipped))

    changes, state = jax.lax.cond(finite, take, skip)
    state = state._replace(
        moments=place(state.moments, settings.memory_kind, "rest"),
        dense=place(state.dense, settings.memory_kind, "rest"),
    )
    return rebuild(updates, changes), state


def _take(
    gradients: Arrays,
    matrices: Arrays,
    calibration: Arrays,
    weights: Arrays | None,
    state: LspState,
    settings: LspSettings,
    due: Arrays,
) -> tuple[Arrays, LspState]:
    before = {path: _watched(path, state) for path in matrices}
    pairs = check_all(calibration, before, due, settings.fit)
    compressed = {
        # A pair that was never fitted compresses nothing: its estimate would be several times off.
        path: jnp.where(x.fitted[..., None, None], project_matrix(matrices[path], x.p, x.q), 0.0)
        for path, x in pairs.items()
    }
    whole = {path: gradients[path].astype(jnp.float32) for path in state.dense}
    compressed, whole = _clipped((compressed, whole), settings.clip)
    schedule = settings.learning_rate
    rate: Any = schedule(state.count) if callable(schedule) else schedule
    decays = _decays(gradients, settings)

    def change(path: str, direction: jax.Array) -> jax.Array:
        if weights is not None and decays[path] and settings.adam.weight_decay:
            decay = settings.adam.weight_decay * weights[path].astype(jnp.float32)
            direction = direction + decay
        return (-rate * direction).astype(gradients[path].dtype)

    changes = {path: jnp.zeros_like(g) for path, g in gradients.items()}
    moments, dense = {}, {}
    for path, x in pairs.items():
        spec = settings.kernels[path]
        carried = carry(state.moments[path], old=before[path], new=x)
        direction, moments[path] = adam_direction(compressed[path], carried, settings.adam)
        lifted = lift_matrix(direction, x.p, x.q)
        if settings.normalize:
            lifted = lifted * step_scale((spec.d_in, spec.d_out), direction.shape[-2:])
        changes[path] = change(path, spec.layout.from_matrix(lifted, spec.in_shape, spec.out_shape))
    for path, g in whole.items():
        direction, dense[path] = adam_direction(g, state.dense[path], settings.adam)
        changes[path] = change(path, direction)
    return changes, LspState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        skipped=state.skipped,
        projectors={path: (x.p, x.q) for path, x in pairs.items()},
        moments=moments,
        dense=dense,
        fitted={path: x.fitted for path, x in pairs.items()},
        errors={path: x.error for path, x in pairs.items()},
    )


def _watched(path: str, state: LspState) -> Watched:
    (p, q), fitted = state.projectors[path], state.fitted[path]
    return Watched(p, q, fitted, state.errors[path], changed=jnp.zeros_like(fitted))


def _due(state: LspState, settings: LspSettings, refit: Any) -> Arrays:
    """Whether each pair is to be checked: by the calendar, or as it never was."""
    every = settings.refit_every
    scheduled = jnp.array(False) if every is None else state.count % every == 0
    return {path: refit & (scheduled | ~jnp.all(fitted)) for path, fitted in state.fitted.items()}


def _any(flags: Arrays) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags.values(), jnp.array(False))


def _clipped(tree: Any, clip: float | None) -> Any:
    if clip is None:
        return tree
    norm = optax.tree.norm(tree)
    return jax.tree.map(lambda g: jnp.where(norm < clip, g, g / norm * clip), tree)


def _matrices(gradients: Arrays, settings: LspSettings) -> Arrays:
    return {path: spec.layout.matrix(gradients[path]) for path, spec in settings.kernels.items()}


def _calibration(refit_gradients: Any, settings: LspSettings) -> Arrays:
    given = arrays(refit_gradients)
    for path, spec in settings.kernels.items():
        found = given[path].shape if path in given else "nothing"
        if found != spec.shape:
            raise ConfigError(
                f"`refit_gradients` must hold a gradient of shape {spec.shape} for kernel '{path}';"
                f" found {found}. Pass a tree like the parameters, or {{path: gradient}}."
            )
    return given


def _decays(gradients: Arrays, settings: LspSettings) -> dict[str, bool]:
    mask = settings.decay_mask
    if mask is None:
        return dict.fromkeys(gradients, True)
    flags = {path: bool(flag) for path, flag in flatten_leaves(mask).items()}
    if flags.keys() != gradients.keys():
        lacking = sorted(flags.keys() ^ gradients.keys())
        raise ConfigError(
            f"`decay_mask` and the parameters differ at '{lacking[0]}'. It must be a tree of "
            "booleans with one for each parameter, or a function from parameters to such a tree."
        )
    return flags
