"""The pipelined trainer against Optax on the whole model, and against itself in one thread."""

import jax
import numpy as np
import optax
import pytest

from emloc_jax.kernels import flatten_leaves, identity_projector
from emloc_jax.offload import (
    AdamOptions,
    FitOptions,
    PipelinedTrainer,
    PipelineOptions,
    SimulatedLink,
)
from tests.offload.pipeline_model import batch_of, head_loss, make_stack, mean_loss, tiny_model

# Compressed, dense on the host and dense on the device, with few fits to compile.
MIXED = (("layers/mlp/.*/kernel", "subspace"), (".*/scale", "device"), (".*", "host"))
EVERYTHING = (("layers/.*/kernel", "subspace"), (".*/scale", "device"), (".*", "host"))


def make_trainer(model, params, *, schedule, refit_seed=1000, **kwargs):
    options = kwargs.pop("options", PipelineOptions())
    return PipelinedTrainer(
        make_stack(model),
        params,
        head_loss(model),
        batch_of(0),
        schedule=schedule,
        options=options,
        calibration=lambda step: batch_of(refit_seed + step),
        **kwargs,
    )


def train(trainer, steps, first=0):
    with trainer:
        records = [trainer.step(batch_of(first + step)) for step in range(steps)]
        return jax.tree.map(np.array, trainer.params()), records


def adamw_reference(model, params, steps, *, rate, decay=0.0, clip=None):
    """`optax.adamw` on the gradient of the whole model, all parameters but norms decaying."""
    mask = {path: path.endswith(("kernel", "embedding")) for path in flatten_leaves(params)}
    chain = [] if clip is None else [optax.clip_by_global_norm(clip)]
    tx = optax.chain(*chain, optax.adamw(rate, weight_decay=decay, mask=mask))
    flat = flatten_leaves(params)
    state = tx.init(flat)
    structure = jax.tree.structure(params)

    @jax.jit
    def step(flat, state, batch):
        tree = jax.tree.unflatten(structure, [flat[path] for path in flatten_leaves(params)])
        loss, gradients = jax.value_and_grad(mean_loss(model))(tree, batch)
        updates, state = tx.update(flatten_leaves(gradients), state, flat)
        return optax.apply_updates(flat, updates), state, loss

    losses = []
    for number in range(steps):
        flat, state, loss = step(flat, state, batch_of(number))
        losses.append(float(loss))
    return flat, losses


def assert_close(got, expected, tolerance):
    got, expected = flatten_leaves(got), flatten_leaves(expected)
    assert got.keys() == expected.keys()
    for path, leaf in got.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=tolerance, err_msg=path)


def assert_same_bits(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("schedule", ["native", "offload"])
def test_without_compression_it_is_adamw(schedule):
    model, params = tiny_model()
    options = PipelineOptions(
        learning_rate=3e-4, adam=AdamOptions(weight_decay=0.1), train=EVERYTHING, clip=0.5
    )
    trained, records = train(make_trainer(model, params, schedule=schedule, options=options), 20)
    expected, losses = adamw_reference(model, params, 20, rate=3e-4, decay=0.1, clip=0.5)
    assert_close(trained, expected, 1e-6)
    np.testing.assert_allclose([r["loss"] for r in records], losses, rtol=1e-5)


def test_identity_projectors_are_the_uncompressed_mode_bit_for_bit():
    model, params = tiny_model()

    def identity(index, spec):
        return identity_projector(spec.d_in), identity_projector(spec.d_out)

    common = dict(learning_rate=1e-2, adam=AdamOptions(weight_decay=0.1), train=EVERYTHING)
    whole, _ = train(
        make_trainer(model, params, schedule="layerwise", options=PipelineOptions(**common)), 20
    )
    options = PipelineOptions(**common, projectors=identity)
    trainer = make_trainer(model, params, schedule="lsp", options=options)
    compressed, _ = train(trainer, 20)
    assert_same_bits(compressed, whole)
    assert trainer.refits[0].refitted == 0


@pytest.mark.parametrize(
    ("schedule", "clip"),
    [
        ("lsp", None),
        ("offload_delayed", 0.3),
        pytest.param("lsp", 0.3, marks=pytest.mark.slow),
        pytest.param("lsp_serial", None, marks=pytest.mark.slow),
        pytest.param("native", None, marks=pytest.mark.slow),
    ],
)
def test_overlap_changes_no_bit(schedule, clip):
    model, params = tiny_model()
    generator = np.random.default_rng(7)

    def jitter(lane, step, block, name):
        return float(generator.uniform(0, 2e-3))

    options = PipelineOptions(
        learning_rate=1e-2,
        train=MIXED,
        subspace=0.5,
        nnz=2,
        fit=FitOptions(steps=5, threshold=0.05),
        refit_every=7,
        clip=clip,
        accumulation=2,
        wire="bfloat16",
    )
    alone, records = train(
        make_trainer(model, params, schedule=schedule, options=options, overlap=False), 30
    )
    link = SimulatedLink(1e8, latency=1e-4)
    trainer = make_trainer(
        model, params, schedule=schedule, options=options, link=link, delay=jitter
    )
    together, others = train(trainer, 30)
    assert_same_bits(together, alone)
    assert records == others
    if schedule == "lsp":
        assert [report.step for report in trainer.refits] == [0, 7, 14, 21, 28]
        assert all(report.refitted for report in trainer.refits)


def test_accumulation_is_one_large_batch():
    model, params = tiny_model()
    common = dict(
        learning_rate=1e-3,
        train=(("layers/mlp/.*/kernel", "subspace"),),
        subspace=0.5,
        nnz=2,
        fit=FitOptions(steps=20),
    )
    results = []
    for accumulation in (1, 4):
        options = PipelineOptions(**common, accumulation=accumulation)
        results.append(train(make_trainer(model, params, schedule="lsp", options=options), 3))
    (one, first), (four, second) = results
    assert_close(one, four, 1e-5)
    np.testing.assert_allclose([r["loss"] for r in first], [r["loss"] for r in second], rtol=1e-5)


def test_delayed_updates_are_one_step_late():
    """The same model by hand: gradients at weights that lack the last update."""
    model, params = tiny_model(layers=2)
    options = PipelineOptions(learning_rate=1e-2, train=((".*", "host"),))
    trained, _ = train(make_trainer(model, params, schedule="offload_delayed", options=options), 5)
    tx = optax.adam(1e-2)
    weights, state, waiting = params, tx.init(params), None
    gradient = jax.jit(jax.grad(mean_loss(model)))
    for number in range(5):
        updates, state = tx.update(gradient(weights, batch_of(number)), state)
        if waiting is not None:
            weights = optax.apply_updates(weights, waiting)
        waiting = updates
    weights = optax.apply_updates(weights, waiting)
    assert_close(trained, jax.tree.map(np.array, weights), 2e-5)
