"""A small parameter tree with kernels of several layouts, and random gradients for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emloc_jax.kernels import KernelSpec, Layout, identity_projector, stack_projectors
from emloc_jax.offload._fit_options import FitOptions
from emloc_jax.offload._lsp_adamw import lsp_adamw

QUICK = FitOptions(steps=8)
SHAPES = {"layers/up/kernel": (2, 12, 10), "mix/kernel": (3, 4, 10), "bias": (5,)}


def spec(path, in_shape, out_shape, *, stack=(), layout=None):
    return KernelSpec(
        path=path,
        module_type="Dense",
        handler="Dense",
        reason="",
        layout=layout or Layout(num_in=len(in_shape), num_out=len(out_shape)),
        stack_shape=stack,
        in_shape=in_shape,
        out_shape=out_shape,
        dtype=jnp.float32,
        input_group=path,
    )


KERNELS = {
    "layers/up/kernel": spec("layers/up/kernel", (12,), (10,), stack=(2,)),
    "mix/kernel": spec("mix/kernel", (3, 4), (10,)),
}


def tree(flat):
    return {
        "layers": {"up": {"kernel": flat["layers/up/kernel"]}},
        "mix": {"kernel": flat["mix/kernel"]},
        "bias": flat["bias"],
    }


def random_tree(seed, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = {k: jnp.asarray(scale * rng.standard_normal(s), dtype) for k, s in SHAPES.items()}
    return tree(draw)


def identities(seed=None):
    """Identity or permutation projectors for both kernels."""
    rng = np.random.default_rng(seed)

    def one(d):
        return identity_projector(d, None if seed is None else rng.permutation(d))

    return {
        "layers/up/kernel": tuple(stack_projectors([one(d), one(d)]) for d in (12, 10)),
        "mix/kernel": (one(12), one(10)),
    }


def compressing(**options):
    """`lsp_adamw` with real projectors at half the size."""
    numbers = {"kernels": KERNELS, "where": ".*", "subspace": 0.5, "nnz": 2, "fit": QUICK}
    return lsp_adamw(1e-2, **{**numbers, **options})


def stepper(tx, traces=None):
    """A compiled `(grads, state, params, **extra) -> (params, state)`."""

    @jax.jit
    def step(grads, state, params, **extra):
        if traces is not None:
            traces.append(1)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def close(tree, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), tree, expected)
