"""Sparse or dense products: measured, because the answer is the machine's."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.kernels._projector import SparseProjector, cache, uncache
from emloc_jax.kernels._projector_products import project

__all__ = ["faster_products"]


def faster_products(
    p: SparseProjector, tokens: int, dtype: Any = jnp.float32, *, repeats: int = 5
) -> SparseProjector:
    """`p` with or without its dense copy, whichever projects `tokens` rows faster here.

    Gathers cost `tokens * d * nnz` and little memory; the dense product costs `tokens * d * size`
    and the copy, but runs on matrix units. Compiles and times both on the default device (the best
    of `repeats` runs each). Make the choice once for a shape, and keep it over a run: the two round
    differently.

    Args:
      p: a projector without stack axes.
      tokens: rows that a step projects at a time.
      dtype: of those rows.
      repeats: timed runs of each kind.

    Example:
      >>> from emloc_jax.kernels import make_projector
      >>> p = faster_products(make_projector(0, 8, 4, 2), tokens=4)
      >>> p.cached is None or p.cached.shape == (8, 4)
      True
    """
    x = jnp.ones((tokens, p.d), dtype)

    def seconds(kind: SparseProjector) -> float:
        program = jax.jit(project).lower(x, kind).compile()
        jax.block_until_ready(program(x, kind))  # the first run also loads the program
        runs = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(program(x, kind))
            runs.append(time.perf_counter() - start)
        return min(runs)

    return min((uncache(p), cache(p)), key=seconds)
