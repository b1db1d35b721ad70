"""With orthonormal projectors a first step of Adam has exactly the learning rate in every entry."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.kernels import flatten_leaves, make_projector, with_values
from emloc_jax.offload import AdamOptions, FitOptions, PipelinedTrainer, PipelineOptions, lsp_adamw
from tests.offload.lsp_case import spec
from tests.offload.pipeline_model import batch_of, head_loss, make_stack, tiny_model

RATE = 1e-3
ACCEPT = FitOptions(threshold=10.0)  # keeps the projectors that were given


def orthonormal(seed, d, s):
    """One entry per row, `d / s` per column, all of the same size: `P^T P = I`."""
    p = make_projector(seed, d, s, 1)
    return with_values(p, p.values * math.sqrt(s / d))


@pytest.mark.parametrize("normalize", [True, False])
def test_optax(normalize):
    kernels = {"a": spec("a", (12,), (8,))}
    pair = orthonormal(0, 12, 4), orthonormal(1, 8, 4)
    tx = lsp_adamw(
        RATE, kernels=kernels, where=".*", subspace=4, nnz=1, fit=ACCEPT,
        projectors={"a": pair}, normalize=normalize,
    )  # fmt: skip
    params = {"a": jnp.zeros((12, 8))}
    gradient = {"a": jax.random.normal(jax.random.key(2), (12, 8))}
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    # Each entry of the step is one of `Delta`, spread over a (12 / 4) by (8 / 4) patch.
    expected = RATE if normalize else RATE / math.sqrt(12 / 4 * 8 / 4)
    np.testing.assert_allclose(np.abs(updates["a"]), expected, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["lsp", "lsp_serial"])
@pytest.mark.parametrize("normalize", [True, False])
def test_trainer(schedule, normalize):
    model, params = tiny_model()
    options = PipelineOptions(
        learning_rate=RATE,
        adam=AdamOptions(eps=1e-12),  # some gradients are small
        train=[("layers/mlp/.*/kernel", "subspace"), ("norm/scale", "host")],
        fit=ACCEPT,
        projectors=lambda index, spec: (
            orthonormal(index, spec.d_in, 8),
            orthonormal(index + 9, spec.d_out, 8),
        ),
        normalize=normalize,
    )
    batch = batch_of(0)
    with PipelinedTrainer(
        make_stack(model), params, head_loss(model), batch, schedule=schedule, options=options,
        calibration=batch_of, overlap=False,
    ) as trainer:  # fmt: skip
        trainer.step(batch)
        new = flatten_leaves(jax.tree.map(np.array, trainer.params()))
    old = flatten_leaves(params)
    for index in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"layers/{index}/mlp/{name}/kernel"
            # 16 x 24 (or its transpose) from 8 x 8.
            expected = RATE if normalize else RATE / math.sqrt(16 / 8 * 24 / 8)
            np.testing.assert_allclose(np.abs(new[path] - old[path]), expected, rtol=1e-3)
    np.testing.assert_allclose(np.abs(new["norm/scale"] - old["norm/scale"]), RATE, rtol=1e-3)
