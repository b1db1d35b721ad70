"""The check of pairs on gradients, and what follows from it; all inside `jit`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emloc_jax.kernels import SparseProjector
from emloc_jax.offload._adam import SubspaceMoments
from emloc_jax.offload._fit_loop import fit_in_jit
from emloc_jax.offload._fit_options import FitNumbers, FitOptions
from emloc_jax.offload._transport import transport

__all__ = ["Watched", "carry", "check", "check_all"]


class Watched(NamedTuple):
    """A pair, and what is known about it.

    Attributes:
      p: `(*stack, d_in, s_in)`, or None.
      q: `(*stack, d_out, s_out)`, or None.
      fitted: bool `(*stack,)`, whether a check has looked at the pair on a gradient other than
        zero. Until then it must not compress anything.
      error: fp32 `(*stack,)`, estimation error at the last check; infinite before the first.
      changed: bool `(*stack,)`, whether the last check has replaced the values of a fitted pair,
        so that moments have to follow.
    """

    p: SparseProjector | None
    q: SparseProjector | None
    fitted: jax.Array
    error: jax.Array
    changed: jax.Array


def check(g: jax.Array, pair: Watched, options: FitOptions | FitNumbers) -> Watched:
    """Measures the error on `g` and, above the threshold, refits from the present values.

    A pair that no fit improves stays. A gradient of zero says nothing, so the pair stays, and
    counts as unfitted if it was. Layers of a stack are taken one after the other, in the memory of
    one, each deciding for itself.

    Args:
      g: `(*stack, d_in, d_out)`, finite.
      pair: with the same stack axes.
      options: a time limit has no meaning here.
    """
    if g.ndim > 2:
        return jax.lax.map(lambda x: check(x[0], x[1], options), (g, pair))
    p, q, report = fit_in_jit(g, pair.p, pair.q, options)  # takes no step below the threshold
    seen = jnp.any(g != 0)
    return Watched(
        p,
        q,
        fitted=pair.fitted | seen,
        error=jnp.where(seen, report.error_after, pair.error),
        changed=pair.fitted & (report.error_after < report.error_before),
    )


def check_all(
    gradients: dict[str, jax.Array],
    pairs: dict[str, Watched],
    due: dict[str, jax.Array],
    options: FitOptions | FitNumbers,
) -> dict[str, Watched]:
    """`check` for all kernels that are due.

    Unstacked kernels of equal shapes go through one loop: a model of many layers is compiled as
    fast as one of few, and no more than one gradient is copied.

    Args:
      gradients: {path: `(*stack, d_in, d_out)`}.
      pairs: {path: pair}.
      due: {path: bool scalar}.
      options: as in `check`.
    """
    groups: dict[Any, list[str]] = {}
    for path, g in gradients.items():
        kind = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), (g, pairs[path]))
        key = str(kind) if g.ndim == 2 else path
        groups.setdefault(key, []).append(path)
    result: dict[str, Watched] = {}
    for paths in groups.values():
        members = [(gradients[path], pairs[path], due[path]) for path in paths]
        result.update(zip(paths, _check_group(members, options), strict=True))
    return {path: result[path] for path in gradients}


def carry(moments: SubspaceMoments, *, old: Watched, new: Watched) -> SubspaceMoments:
    """Moments in the subspace of the pair after a check: transported where it `changed`.

    From a pair that was never fitted nothing is carried: its moments are zero, and stay so.

    Args:
      moments: `(*stack, s_in, s_out)`.
      old: the pair before the check.
      new: the pair after it, of the same sizes.
    """

    def follow() -> SubspaceMoments:
        moved = transport(moments, old=(old.p, old.q), new=(new.p, new.q))
        changed = new.changed[..., None, None]
        return SubspaceMoments(
            mu=jnp.where(changed, moved.mu, moments.mu),
            nu=jnp.where(changed, moved.nu, moments.nu),
            count=moments.count,
        )

    return jax.lax.cond(jnp.any(new.changed), follow, lambda: moments)


def _check_group(
    members: list[tuple[jax.Array, Watched, jax.Array]], options: FitOptions | FitNumbers
) -> list[Watched]:
    """Checks pairs that agree in all shapes."""

    if len(members) == 1:
        g, pair, due = members[0]
        return [jax.lax.cond(due, lambda: check(g, pair, options), lambda: _unchanged(pair))]
    choose = [lambda g=g: g for g, _, _ in members]
    pairs, due = jax.tree.map(lambda *x: jnp.stack(x), *[(pair, due) for _, pair, due in members])

    def visit(x: Any) -> Watched:
        index, pair, due = x
        return jax.lax.cond(
            due,
            # The gradient is fetched only where it is wanted.
            lambda: check(jax.lax.switch(index, choose), pair, options),
            lambda: _unchanged(pair),
        )

    done = jax.lax.cond(
        jnp.any(due),
        lambda: jax.lax.map(visit, (jnp.arange(len(members)), pairs, due)),
        lambda: _unchanged(pairs),
    )
    return [jax.tree.map(lambda leaf, i=i: leaf[i], done) for i in range(len(members))]


def _unchanged(pair: Watched) -> Watched:
    return pair._replace(changed=jnp.zeros_like(pair.changed))
