"""Every verb of the library on a tiny FLUX, from a diffusers folder to a diffusers folder."""

import functools
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emloc_jax._program_memory import analysed
from emloc_jax.adapters import attach, choose_limit, correct, init_adapters, merge
from emloc_jax.checkpoints import (
    load_emulator,
    load_pretrained,
    save_emulator,
    save_pretrained,
)
from emloc_jax.emulator import calibrate, compress
from emloc_jax.kernels import LowRankKernel, find_kernels, flatten_leaves, intercept
from emloc_jax.memory._abstract_emulator import abstract_adapters, abstract_emulator
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._setting import Setting
from emloc_jax.models import Flux, FluxConfig, grid_ids
from emloc_jax.training import (
    FlowBatches,
    LatentData,
    evaluate_loss,
    init_state,
    make_flow_loss,
    make_train_step,
    noisy_latents,
    train,
)
from tests.models.torch_flux import HEIGHT, WIDTH, WORDS, torch_flux, torch_velocity

BLOCKS = "(double|single)_layers/.*"
GUIDANCE = 3.5


def inputs_of(batch):
    """What `Flux` is called on, from a batch."""
    noisy = noisy_latents(batch["latents"], batch["noise"], batch["timesteps"])
    names = ("timesteps", "prompt_embeds", "pooled_prompt_embeds", "image_ids", "guidance")
    return {"latents": np.asarray(noisy), **{name: batch[name] for name in names if name in batch}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A base on disk, data, and the programs that several tests share."""
    folder = tmp_path_factory.mktemp("flux") / "base"
    torch_flux("guided").save_pretrained(folder)
    base = load_pretrained(folder, scan_layers=True, remat=True)
    config = base.config
    rng = np.random.default_rng(0)
    data = LatentData(
        rng.normal(size=(5, HEIGHT * WIDTH, config.in_channels)).astype(np.float32),
        rng.normal(size=(5, WORDS, config.prompt_dim)).astype(np.float32),
        rng.normal(size=(5, config.pooled_dim)).astype(np.float32),
        grid_ids(HEIGHT, WIDTH),
    )
    batches = FlowBatches(data, batch_size=2, sampling="stratified", epochs=1, guidance=GUIDANCE)
    traces = []
    apply = intercept(base.model.apply)

    def counted(*args, **kwargs):
        traces.append(1)
        return apply(*args, **kwargs)

    kernels = find_kernels(base.model.apply, base.params, **inputs_of(batches.batch(0)))
    loss = make_flow_loss(counted)
    del traces[:]
    moments = calibrate(
        lambda variables, batch: loss(variables["params"], batch)[0],
        base.params,
        batches,
        kernels=kernels,
        mask=lambda batch: batch["weights"] > 0,
        gradients=True,
    )
    traced = len(traces)
    emulator, report = compress(base.params, moments, kernels=kernels, ratios=[(BLOCKS, 0.5)])
    return types.SimpleNamespace(**locals())


def test_calibration_counts_the_pictures_and_no_padding(bench):
    """Against the definition, on the kernel whose inputs are known without the model."""
    assert bench.traced == 1  # three batches, one program
    batches = [bench.batches.batch(number) for number in range(3)]
    assert [b["weights"].tolist() for b in batches] == [[1, 1], [1, 1], [1, 0]]
    rows = [inputs_of(b)["latents"][b["weights"] > 0].reshape(-1, 8) for b in batches]
    rows = np.concatenate(rows).astype(np.float64)
    found = bench.moments["x_embedder/kernel"]
    assert found.count == len(rows) == 5 * HEIGHT * WIDTH
    np.testing.assert_allclose(found.sum, rows.T @ rows, rtol=1e-4, atol=1e-3)
    counts = {path: np.unique(moment.count).tolist() for path, moment in bench.moments.items()}
    text, image = 5 * WORDS, 5 * HEIGHT * WIDTH
    assert counts["double_layers/attn/add_q_proj/kernel"] == [text]
    assert counts["double_layers/ff/outer/kernel"] == [image]
    assert counts["single_layers/proj_out/kernel"] == [text + image]
    assert counts["single_layers/norm/linear/kernel"] == [5]
    assert counts["norm_out/linear/kernel"] == [5]


def test_every_linear_layer_of_the_blocks_is_compressed_and_nothing_else(bench):
    boxed = {p for p, x in flatten_leaves(bench.emulator).items() if isinstance(x, LowRankKernel)}
    assert boxed == {path for path in bench.kernels if "_layers/" in path}
    assert len(boxed) == 14 + 6
    assert all(bench.report[path].ratio <= 0.5 for path in boxed)


def test_the_emulator_is_better_than_a_plain_one_where_the_data_are(bench):
    path = "single_layers/attn/to_q/kernel"
    kernels, base = {path: bench.kernels[path]}, bench.base
    plain, _ = compress(base.params, None, kernels=kernels, ratios=0.5)
    one_sided, _ = compress(
        base.params, bench.moments, kernels=kernels, ratios=0.5, weighting="one_sided"
    )
    moment = np.asarray(bench.moments[path].sum, np.float64)
    original = np.asarray(flatten_leaves(base.params)[path], np.float64)

    def error(emulator):
        box = flatten_leaves(emulator)[path]
        assert isinstance(box, LowRankKernel)
        gap = original - np.asarray(box.left, np.float64) @ np.asarray(box.right, np.float64)
        return np.einsum("lio,lij,ljo->", gap, moment, gap)

    assert error(one_sided) < 0.9 * error(plain)


def test_train_on_the_emulator_correct_and_give_back(bench, tmp_path):
    base, traces = bench.base, bench.traces
    adapters = init_adapters(jax.random.key(1), bench.kernels, where=BLOCKS, rank=2, alpha=4.0)
    evaluation = list(bench.batches)
    started = evaluate_loss(bench.loss, attach(bench.emulator, adapters), evaluation).loss
    tx = optax.adam(1e-2)
    step = make_train_step(bench.loss, tx, combine=lambda a, frozen, key: attach(frozen, a))
    stream = FlowBatches(bench.data, batch_size=2, guidance=GUIDANCE)
    del traces[:]
    result = train(step, init_state(adapters, tx), stream, steps=12, frozen=bench.emulator)
    assert len(traces) == 1  # one trace serves every step
    trained = result.state.trainables
    ended = evaluate_loss(bench.loss, attach(bench.emulator, trained), evaluation).loss
    assert ended < started

    limit, losses = choose_limit(
        trained, base.params, bench.emulator, bench.loss, evaluation, candidates=(1.0,)
    )
    corrected = correct(trained, base.params, bench.emulator, limit=1.0)
    served = attach(base.params, corrected)
    found = evaluate_loss(bench.loss, served, evaluation).loss
    np.testing.assert_allclose(found, losses[1.0], rtol=1e-4)
    assert losses[limit] == min(losses.values())

    save_emulator(tmp_path / "emulator", bench.emulator, bench.report, base=base)
    again = load_emulator(tmp_path / "emulator", base)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, bench.emulator)))

    # Adapters attached here, and merged and read by torch, have the same loss.
    save_pretrained(tmp_path / "merged", merge(base.params, corrected), like=base)
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "merged").eval()
    squares = []
    for batch in evaluation:
        inputs = inputs_of(batch)
        inputs["image_ids"] = inputs["image_ids"][0]
        gaps = torch_velocity(model, inputs) - (batch["noise"] - batch["latents"])
        squares.append((gaps**2).mean(axis=(1, 2))[batch["weights"] > 0])
    np.testing.assert_allclose(found, np.concatenate(squares).mean(), rtol=1e-4)


def test_training_the_emulator_takes_less_memory_than_training_the_original():
    """By the compiler's own figures; nothing is allocated."""
    config = FluxConfig(16, 16, 3, 6, 32, 4, 32, 32, axes_dims=(8, 12, 12))
    model = Flux(config, scan_layers=True, remat=True)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    batch = {
        "latents": shape((1, 16, 16)),
        "noise": shape((1, 16, 16)),
        "timesteps": shape((1,)),
        "prompt_embeds": shape((1, 8, 32)),
        "pooled_prompt_embeds": shape((1, 32)),
        "image_ids": shape((1, 16, 3)),
    }
    inputs = {name: batch[name] for name in batch if name != "noise"}
    params = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    kernels = find_kernels(model.apply, params, **inputs)
    abstract = AbstractModel("tiny", model, params, kernels)
    setting = Setting(ratio=0.25, where=(BLOCKS,), lora_where=(BLOCKS,), lora_rank=4)
    tx = optax.sgd(0.1)
    step = make_train_step(
        make_flow_loss(intercept(model.apply)),
        tx,
        combine=lambda a, frozen, key: attach(frozen, a),
    )
    state = jax.eval_shape(lambda a: init_state(a, tx), abstract_adapters(abstract, setting))

    def peak(frozen):
        return analysed(step.lower(state, frozen, batch)).peak

    whole, emulated = peak(params), peak(abstract_emulator(abstract, setting))
    assert emulated < 0.6 * whole
