"""Random adapters on a loaded model."""

import re

import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import Adapter
from emloc_jax.kernels import flatten_leaves


def random_adapters(base, where="layers/.*", rank=2, alpha=4.0, rslora=False, corrected=False):
    """Random adapters on the kernels of the tree whose path matches."""
    rng, adapters = np.random.default_rng(5), {}
    for path, leaf in flatten_leaves(base.params).items():
        if path.endswith("/kernel") and re.fullmatch(where, path):
            *stack, d_in, d_out = leaf.shape
            a = rng.normal(0, 0.3, (*stack, d_in, rank)).astype(np.float32)
            b = rng.normal(0, 0.3, (*stack, rank, d_out)).astype(np.float32)
            adapters[path] = Adapter(
                jnp.asarray(a), jnp.asarray(b), alpha=alpha, rslora=rslora, corrected=corrected
            )
    assert adapters
    return adapters
