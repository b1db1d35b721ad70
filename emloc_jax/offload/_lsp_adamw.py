"""LSP-Offload's optimizer as one Optax transformation."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax

from emloc_jax.errors import ConfigError, ResumeError
from emloc_jax.kernels import KernelSpec, select
from emloc_jax.offload._adam import AdamOptions
from emloc_jax.offload._fit_options import DEFAULT_FIT, FitOptions
from emloc_jax.offload._lsp_state import Dense, LspSettings, LspState, init_state
from emloc_jax.offload._lsp_step import lsp_step
from emloc_jax.offload._pairs import Pair, Subspace, make_pairs, subspace_sizes

__all__ = ["lsp_adamw"]


def lsp_adamw(
    learning_rate: float | optax.Schedule,
    *,
    kernels: Mapping[str, KernelSpec],
    where: str | Sequence[str],
    subspace: Subspace,
    nnz: int = 4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Any = None,
    fit: FitOptions = DEFAULT_FIT,
    refit_every: int | None = 100,
    clip: float | None = None,
    normalize: bool = True,
    dense: Dense = "train",
    seed: int = 0,
    projectors: Mapping[str, Pair] | None = None,
    projector_dtype: Any = jnp.float32,
    law: Literal["sign", "normal"] = "sign",
    memory_kind: Literal["pinned_host"] | None = None,
    state_dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """AdamW in learned sparse subspaces (LSP-Offload, arXiv 2406.10181, algorithm 1).

    For each chosen kernel `K (d_in, d_out)` with gradient `G`:

        K <- K - lr (c P Adam(P^T G Q) Q^T + weight_decay K)

    so Adam's moments have the size of the subspace (`c`: see `normalize`). At the first step and
    then every `refit_every` steps the estimation error of each pair is measured; where it exceeds
    `fit.threshold` the values of P and Q are learnt on that gradient, from the present ones
    (positions stay), and the moments carried over. The first fit happens before the first step.
    Everything is one pure function of arrays: it runs inside the caller's own `jit`, under
    shardings, over stacked (scanned) kernels, on any backend, and traces once.

    A step with a NaN or an infinity in any gradient that is used changes nothing: updates are
    zero, and only `state.skipped` counts up.

    `update` takes two optional extra arguments. `refit_gradients`: a tree like the parameters (or
    {path: gradient}) to measure and fit on, from a fresh calibration batch, in place of the
    gradients at hand; it is only used for that, so steps without a check can pass zeros (with
    `lax.cond` on `state.count % refit_every`). `refit`: a boolean; False puts off a check that
    falls due in this call. `optax.MultiSteps` runs `update` on every mini-step and drops all but
    the last: pass `refit=state.mini_step == k - 1` so that only the full gradient is fitted.

    Args:
      learning_rate: a rate, or a schedule of `state.count`.
      kernels: from `find_kernels` on the parameters; says how a kernel is laid out and stacked.
      where: regular expression(s) on whole paths: the kernels to compress.
      subspace: an int `s` for cores `(s, s)`; a float `f` in (0, 1] for `(f d_in, f d_out)`; or
        rules `(regex, int or float)`.
      nnz: non-zeros in each row of a projector.
      b1: decay of mu.
      b2: decay of nu.
      eps: added to the root of nu.
      weight_decay: decoupled, times the learning rate, of the full parameters.
      decay_mask: tree of booleans, or a function from the parameters to one; by default all
        trained parameters decay, as in `optax.adamw`. Frozen ones never do.
      fit: how values are learnt; `time_limit` must be None, as nothing looks at the clock in `jit`.
      refit_every: steps between checks; None for one before the first step only.
      clip: largest global norm of the gradients as they enter Adam: compressed ones, together with
        those of parameters that are trained whole. For a fitted pair of error e it is about
        sqrt(1 - e^2) of the norm of the true gradient.
      normalize: lengthen steps in subspaces by `c = sqrt(d_in d_out / (s_in s_out))`, which makes
        them as long as Adam's own (`step_scale`), so that one rate serves compressed and whole
        parameters and any size of subspace. False: `c = 1`, as in the paper.
      dense: what happens to all other parameters: 'train' with AdamW, 'freeze', or rules `(regex,
        'train' or 'freeze')` that cover them.
      seed: for positions and first values.
      projectors: {path: (P, Q)} to begin with in place of random ones; None leaves a side whole.
        They are checked, and refitted, like others.
      projector_dtype: of the values, fp32 or bf16.
      law: of the first values, see `make_projector`.
      memory_kind: where mu and nu rest between steps: the device's own memory, or 'pinned_host'.
      state_dtype: of mu and nu.

    Returns:
      A transformation whose state is an `LspState`. Updates have the dtype of the gradients.

    Raises:
      ConfigError: a number out of range; at `init`, `kernels` that are not those of the parameters,
        boxed parameters, or `dense` rules with gaps.
      ProjectorError: a projector that cannot exist for its kernel, at once and by path.
      UnmatchedRuleError: an expression matches nothing.
      ResumeError: at `update`, a state of other kernels or subspace sizes. A restored state with
        other projectors of the same sizes is for `check_same_projectors` to find.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from emloc_jax.kernels import find_kernels
      >>> model, x = nn.Dense(8), jnp.ones((2, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> kernels = find_kernels(model.apply, params, x)
      >>> tx = lsp_adamw(0.1, kernels=kernels, where="kernel", subspace=4, nnz=2,
      ...                fit=FitOptions(steps=5))
      >>> state = tx.init(params)
      >>> state.moments["kernel"].mu.shape, state.dense["bias"].mu.shape
      ((4, 4), (8,))
      >>> grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x) ** 2))(params)
      >>> updates, state = jax.jit(tx.update)(grads, state, params)
      >>> int(state.count), updates["kernel"].shape
      (1, (8, 8))
    """
    adam = AdamOptions(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    _check(learning_rate, fit, refit_every, clip, memory_kind, state_dtype)
    chosen = {path: kernels[path] for path in select(where, kernels)}
    draw = functools.partial(
        make_pairs,
        kernels,
        where=where,
        subspace=subspace,
        nnz=nnz,
        seed=seed,
        dtype=projector_dtype,
        law=law,
        given=projectors,
    )
    sizes = subspace_sizes(kernels, where=where, subspace=subspace, nnz=nnz, given=projectors)

    def settings(mask: Any) -> LspSettings:
        return LspSettings(
            learning_rate=learning_rate,
            kernels=chosen,
            make_pairs=draw,
            adam=adam,
            fit=fit,
            refit_every=refit_every,
            clip=clip,
            normalize=normalize,
            dense=dense,
            decay_mask=mask,
            memory_kind=memory_kind,
            state_dtype=state_dtype,
        )

    def init(params: Any) -> LspState:
        return init_state(params, settings(None))

    def update(
        updates: Any,
        state: LspState,
        params: Any = None,
        *,
        refit_gradients: Any = None,
        refit: Any = True,
        **extra_args: Any,
    ) -> tuple[Any, LspState]:
        del extra_args
        _check_sizes(state, sizes)
        mask = decay_mask(params) if callable(decay_mask) else decay_mask
        return lsp_step(
            updates, state, params, settings(mask), refit_gradients=refit_gradients, refit=refit
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _check_sizes(state: LspState, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuses, while tracing, a state that was made with other options."""
    found = {path: tuple(moments.mu.shape[-2:]) for path, moments in state.moments.items()}
    for path in sorted(found.keys() | sizes.keys()):
        if found.get(path) != sizes.get(path):
            raise ResumeError(
                f"Kernel '{path}' is to be trained in a subspace of sizes {sizes.get(path)}, but "
                f"the state has {found.get(path)}: it was made with other options. Go on with "
                "those, or begin with a state of `init`."
            )


def _check(
    learning_rate: Any,
    fit: FitOptions,
    refit_every: int | None,
    clip: float | None,
    memory_kind: str | None,
    state_dtype: Any,
) -> None:
    """Refuses impossible settings."""
    if isinstance(learning_rate, (int, float)) and not 0 <= learning_rate < math.inf:
        raise ConfigError(f"`learning_rate` is {learning_rate}; it must not be negative.")
    if fit.time_limit is not None:
        raise ConfigError(
            f"`fit.time_limit` is {fit.time_limit} s, but nothing can watch the time inside `jit`. "
            "Bound the fit by `steps`, or fit outside with `fit`."
        )
    if refit_every is not None and refit_every < 1:
        raise ConfigError(f"`refit_every` is {refit_every}; give steps >= 1, or None.")
    if clip is not None and not clip > 0:
        raise ConfigError(f"`clip` is {clip}; a norm must be positive, or None for no clipping.")
    if memory_kind not in (None, "pinned_host"):
        raise ConfigError(f"`memory_kind` is {memory_kind!r}; give 'pinned_host' or None.")
    if not jnp.issubdtype(state_dtype, jnp.floating):
        raise ConfigError(f"`state_dtype` is {state_dtype}; moments need a float dtype.")
