"""Gradients with a known spectrum, and dense float64 views of projectors."""

import numpy as np

from emloc_jax.kernels import make_projector, stack_projectors, to_dense


def power_law(rows, columns, power=0.75, seed=0):
    """A float32 matrix with singular values `k^-power` and random singular vectors."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    rank = min(rows, columns)
    values = np.arange(1, rank + 1) ** -power
    return ((left[:, :rank] * values) @ right[:, :rank].T).astype(np.float32)


def dense(projector, d=None):
    """The float64 matrix of a projector; the identity of size `d` for None."""
    if projector is None:
        return np.eye(d)
    return np.asarray(to_dense(projector), np.float64)


def dense_error(g, p, q):
    """Relative estimation error by its definition."""
    g = np.asarray(g, np.float64)
    p, q = dense(p, g.shape[-2]), dense(q, g.shape[-1])
    return np.linalg.norm(p @ p.T @ g @ q @ q.T - g) / np.linalg.norm(g)


def stacked(*projectors):
    return stack_projectors(list(projectors))


def pair(d_in, d_out, s_in, s_out, nnz=2, seed=0, **options):
    return (
        make_projector(seed, d_in, s_in, nnz, **options),
        make_projector(seed + 100, d_out, s_out, nnz, **options),
    )
