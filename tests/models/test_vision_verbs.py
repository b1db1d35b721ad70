"""Every verb of the library on a ViT, a SigLIP and an InternVL, from calibration to merge."""

import functools

import jax
import numpy as np
import optax
import pytest

from emloc_jax.adapters import attach, correct, init_adapters, merge
from emloc_jax.emulator import calibrate, compress
from emloc_jax.emulator._calibrate import calibration_step
from emloc_jax.emulator._taps import Taps
from emloc_jax.kernels import LowRankKernel, find_kernels, flatten_leaves, intercept, materialize
from emloc_jax.training import init_state, make_train_step
from tests.models.vision_cases import case

CASES = ("vit-labels", "siglip-labels", "internvl")
# Kernels that are compressed and get adapters; without the first part of InternVL's, its image
# encoder stays whole.
WHERE = {"internvl": ["vision/layers/.*", "projector/.*", "layers/.*"]}


@functools.cache
def calibrated(variant):
    """Kernels with their moments; the head of a language model is left out."""
    c = case(variant)
    kernels = find_kernels(c.model.apply, c.params, *c.inputs)
    kernels = {path: spec for path, spec in kernels.items() if path != "lm_head/kernel"}
    loss = c.make_loss(intercept(c.model.apply))
    moments = calibrate(
        lambda variables, batch: loss(variables["params"], batch)[0],
        c.params,
        [c.batch],
        kernels=kernels,
        mask=c.mask,
        gradients=True,
    )
    return c, kernels, moments


@pytest.mark.parametrize("variant", CASES)
def test_from_calibration_to_merge(variant):
    c, kernels, moments = calibrated(variant)
    where = WHERE.get(variant, ["layers/.*"])
    rules = [(rule, 0.6) for rule in where]
    emulator, report = compress(c.params, moments, kernels=kernels, ratios=rules)
    adapters = init_adapters(jax.random.key(0), kernels, where=where, rank=2, alpha=4.0)
    loss, traces = c.make_loss(intercept(c.model.apply)), []

    def traced(params, batch):
        traces.append(1)
        return loss(params, batch)

    tx = optax.adam(3e-2)
    step = make_train_step(traced, tx, combine=lambda own, frozen, key: attach(frozen, own))
    state, losses = init_state(adapters, tx), []
    for _ in range(12):
        state, metrics = step(state, emulator, c.batch)
        losses.append(float(metrics["loss"]))
    trained = state.trainables
    assert losses[-1] < 0.8 * losses[0] and len(traces) == 1
    moved = {path: np.abs(adapter.lora_b).max() for path, adapter in trained.items()}
    assert min(moved.values()) > 0, moved  # all three parts of an InternVL learn
    low = [p for p, leaf in flatten_leaves(emulator).items() if isinstance(leaf, LowRankKernel)]
    assert set(low) == set(trained)
    assert "embed_patches" in " ".join(k.path for k in report.kernels if k.rank is None)

    # The step holds the factors, and never multiplies them out.
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (emulator, c.params)]
    assert sizes[0] < sizes[1]
    text = str(jax.make_jaxpr(jax.grad(lambda a: loss(attach(emulator, a), c.batch)[0]))(trained))
    for path in trained:
        shape = (kernels[path].d_in, kernels[path].d_out)
        if shape[0] != shape[1]:
            assert f"f32[{shape[0]},{shape[1]}]" not in text, path

    corrected = correct(trained, c.params, emulator, limit=float("inf"))
    served, merged = materialize(attach(c.params, corrected)), merge(c.params, corrected)
    for path, leaf in flatten_leaves(merged).items():
        np.testing.assert_allclose(leaf, flatten_leaves(served)[path], atol=1e-5)
        same = np.array_equal(leaf, flatten_leaves(c.params)[path])
        assert same == (path not in trained), path


@pytest.mark.parametrize("variant", ["vit-labels", "internvl"])
def test_padding_does_not_count(variant):
    """What lies in padded rows, unused tiles and padded tokens changes no moment."""
    c, kernels, moments = calibrated(variant)
    counts = {"layers": 3 * 10, "classifier": 3}
    if variant == "internvl":  # 4 real tiles of 16 patches and a class token, of 4 image tokens
        counts = {"vision/layers": 4 * 17, "projector": 4 * 4, "layers": c.batch["segments"].sum()}
    for path, moment in moments.items():
        for part, count in counts.items():
            assert not path.startswith(f"{part}/") or np.all(moment.count == count), path

    other = {key: np.array(value) for key, value in c.batch.items()}
    if variant == "internvl":
        other["pixels"][c.batch["tiles"] == 0] = 3.0
        other["tokens"][c.batch["segments"] == 0] = 7
    else:
        other["pixels"][c.batch["weights"] == 0] = 3.0

    def run(variables, batch):
        names = ("tokens", "positions", "segments", "pixels")
        return c.model.apply(variables, *[batch[name] for name in names if name in batch])

    taps = Taps(kernels)
    step = calibration_step(run, taps, mask=c.mask)
    plain, changed = step(c.params, taps.zeros(), c.batch), step(c.params, taps.zeros(), other)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), plain, changed
    )
    for path, sums in plain.items():
        np.testing.assert_allclose(sums["moment"], moments[path].sum, rtol=1e-4, atol=1e-3)


def test_the_image_encoder_of_an_internvl_can_stay_whole():
    c, kernels, moments = calibrated("internvl")
    assert sum(path.startswith("vision/") for path in kernels) == 7
    emulator, _ = compress(c.params, moments, kernels=kernels, ratios=[("layers/.*", 0.6)])
    adapters = init_adapters(jax.random.key(0), kernels, where="layers/.*", rank=2, alpha=4.0)
    assert all(path.startswith("layers/") for path in adapters)
    same = jax.tree.map(np.array_equal, emulator["vision"], c.params["vision"])
    assert all(jax.tree.leaves(same))
