"""Flow matching: times, latents on disk, batches, loss and sampler."""

import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from emloc_jax.errors import ConfigError, DataError, OutputExistsError, ResumeError
from emloc_jax.models import Flux, grid_ids, layer_depths, pack_latents, stack_layers
from emloc_jax.training import (
    FlowBatches,
    LatentData,
    draw_times,
    euler_sample,
    flow_velocity,
    make_flow_loss,
    noisy_latents,
    read_latents,
    resolution_shift,
    sampling_times,
    write_latents,
)
from tests.models.torch_flux import (
    HEIGHT,
    WIDTH,
    our_config,
    our_params,
    random_inputs,
    torch_flux,
    torch_velocity,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def data(count=5):
    return LatentData(
        normal(count, 6, 8), normal(count, 3, 12), normal(count, 10), grid_ids(3, 2), "here"
    )


def test_drawn_times_have_the_distribution_that_was_asked_for():
    uniform = draw_times(20000, seed=1, sampling="uniform")
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.005
    logits = draw_times(20000, seed=1, mean=0.3, deviation=0.7).astype(np.float64)
    logits = np.log(logits / (1 - logits))
    assert abs(logits.mean() - 0.3) < 0.02 and abs(logits.std() - 0.7) < 0.02
    spread = np.sort(draw_times(100, seed=[1, 2], sampling="stratified"))
    np.testing.assert_array_equal((spread * 100).astype(int), np.arange(100))
    # A shift is a shift of the logits by its logarithm.
    shifted = draw_times(20000, seed=1, mean=0.3, deviation=0.7, shift=3.0).astype(np.float64)
    shifted = np.log(shifted / (1 - shifted))
    np.testing.assert_allclose(shifted, logits + math.log(3), atol=1e-3)
    assert draw_times(9, seed=1, deviation=1e9).min() > 0
    with pytest.raises(ConfigError, match="sampling='even'"):
        draw_times(1, seed=0, sampling="even")
    with pytest.raises(ConfigError, match="shift is 0"):
        draw_times(1, seed=0, shift=0)


@pytest.mark.parametrize("tokens", [16, 256, 4096])
def test_sampling_times_are_the_flux_pipeline_s(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=calculate_shift(tokens))
    ours = sampling_times(7, resolution_shift(tokens))
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)


def test_loss_is_the_definition_and_torch_s():
    config = our_config("guided")
    inputs = random_inputs(config)
    noise = normal(*inputs["latents"].shape)
    batch = inputs | {"noise": noise, "weights": np.array([1.0, 0.5], np.float32)}
    params = stack_layers(our_params("guided"), layer_depths(config))
    loss = jax.jit(make_flow_loss(Flux(config, scan_layers=True).apply))
    total, weight = loss(params, batch)
    noisy = noisy_latents(inputs["latents"], noise, inputs["timesteps"])
    theirs = torch_velocity(torch_flux("guided"), inputs | {"latents": np.asarray(noisy)})
    squares = ((theirs - (noise - inputs["latents"])) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(total, squares @ batch["weights"], rtol=1e-5)
    assert weight == 1.5


def test_a_picture_of_weight_zero_does_not_count_even_if_it_is_nan():
    apply = lambda variables, x, *others, guidance: x  # noqa: E731
    names = ("prompt_embeds", "pooled_prompt_embeds", "image_ids")
    batch = {"latents": jnp.array([[[1.0]], [[jnp.nan]]]), "noise": jnp.ones((2, 1, 1))}
    batch |= {"timesteps": jnp.zeros(2), "weights": jnp.array([1.0, 0.0]), **dict.fromkeys(names)}
    assert make_flow_loss(apply)({}, batch) == (1.0, 1.0)


def test_the_sampler_goes_where_diffusers_goes():
    config = our_config("guided")
    inputs = random_inputs(config, seed=3)
    times = sampling_times(3, 1.7)
    params = stack_layers(our_params("guided"), layer_depths(config))
    apply = Flux(config, scan_layers=True).apply
    run = jax.jit(lambda p, x: euler_sample(flow_velocity(apply, p, inputs), x, times))
    ours = run(params, inputs["latents"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1])
    x = torch.asarray(inputs["latents"])
    for time in scheduler.timesteps:
        step = {"latents": x.numpy(), "timesteps": np.full(2, time / 1000, np.float32)}
        velocity = torch.asarray(torch_velocity(torch_flux("guided"), inputs | step))
        x = scheduler.step(velocity, time, x).prev_sample
    np.testing.assert_allclose(ours, x.numpy(), rtol=0, atol=1e-4)


def test_latents_there_and_back(tmp_path):
    pictures, prompts, pooled = normal(3, 2 * HEIGHT, 2 * WIDTH, 2), normal(3, 4, 6), normal(3, 5)
    path = write_latents(tmp_path / "pictures.safetensors", pictures, prompts, pooled)
    found = read_latents(path)
    np.testing.assert_array_equal(found.latents, pack_latents(pictures))
    np.testing.assert_array_equal(found.image_ids, grid_ids(HEIGHT, WIDTH))
    packed = tmp_path / "packed.safetensors"
    write_latents(packed, found.latents, prompts, pooled, grid=(HEIGHT, WIDTH))
    again = read_latents(packed)
    np.testing.assert_array_equal(again.latents, found.latents)
    np.testing.assert_array_equal(again.image_ids, found.image_ids)
    np.testing.assert_array_equal(again.pooled_prompt_embeds, pooled)
    with pytest.raises(OutputExistsError):
        write_latents(packed, found.latents, prompts, pooled, grid=(HEIGHT, WIDTH))
    half = {"latents": pictures, "prompt_embeds": prompts, "pooled_prompt_embeds": pooled}
    save_file({k: v.astype(np.float16) for k, v in half.items()}, tmp_path / "half.safetensors")
    assert read_latents(tmp_path / "half.safetensors").latents.dtype == np.float32


def good():
    return {
        "latents": normal(2, 4, 8),
        "prompt_embeds": normal(2, 3, 12),
        "pooled_prompt_embeds": normal(2, 10),
    }


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"latents": None}, "lacks latents"),
        ({"masks": normal(2)}, "unknown tensors masks"),
        ({"latents": normal(2, 6, 8)}, "6 tokens cannot be laid out as"),
        ({"latents": normal(2, 4, 5, 2)}, "even H and W"),
        ({"latents": normal(8, 4)}, "even H and W"),
        ({"prompt_embeds": normal(3, 3, 12)}, "prompt_embeds has shape"),
        ({"pooled_prompt_embeds": normal(2, 1, 10)}, "pooled_prompt_embeds has shape"),
        ({"latents": normal(0, 4, 8)}, "at least one"),
        ({"pooled_prompt_embeds": np.full((2, 10), np.nan, np.float32)}, "infinite or NaN"),
        ({"prompt_embeds": np.ones((2, 3, 12), np.int32)}, "give floats|type int32"),
        ({"grid": np.array([2, 3], np.int32)}, "laid out as"),
    ],
)
def test_latents_that_are_refused(tmp_path, changes, words):
    path = tmp_path / "x.safetensors"
    save_file({k: v for k, v in (good() | changes).items() if v is not None}, path)
    if changes.get("prompt_embeds") is not None and changes["prompt_embeds"].dtype == np.int32:
        words = ""  # cast to fp32 on reading
        assert read_latents(path).prompt_embeds.dtype == np.float32
        return
    with pytest.raises(DataError, match=words):
        read_latents(path)


def test_files_that_are_no_latents(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_latents(tmp_path / "nothing.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="no safetensors file"):
        read_latents(tmp_path / "x.safetensors")
    rough = {k: torch.asarray(v).bfloat16() for k, v in good().items()}
    save_torch(rough, tmp_path / "rough.safetensors")
    try:
        found = read_latents(tmp_path / "rough.safetensors")
    except DataError as error:
        assert "fp32 or fp16" in str(error)
    else:
        assert found.latents.dtype == np.float32


def test_batches_cover_the_pictures_and_can_be_gone_on_with():
    pictures = data()
    stream = FlowBatches(pictures, batch_size=2, seed=3, sampling="stratified", epochs=2)
    batches = list(stream)
    assert len(batches) == len(stream) == 6
    for epoch in (batches[:3], batches[3:]):
        real = np.concatenate([b["weights"] > 0 for b in epoch])
        assert real.sum() == 5
        seen = np.concatenate([b["latents"] for b in epoch])[real]
        np.testing.assert_array_equal(np.sort(seen, 0), np.sort(pictures.latents, 0))
        times = np.concatenate([b["timesteps"] for b in epoch])[real]
        assert sorted((5 * times).astype(int)) == [0, 1, 2, 3, 4]
    noise = np.concatenate([b["noise"] for b in batches])
    assert len(np.unique(noise)) == noise.size  # every picture of every pass has its own

    iterator = iter(FlowBatches(pictures, batch_size=2, seed=3, guidance=3.5))
    for _ in range(4):
        next(iterator)
    state, expected = iterator.get_state(), next(iterator)
    assert expected["guidance"].tolist() == [3.5, 3.5]
    fresh = iter(FlowBatches(pictures, batch_size=2, seed=3, guidance=3.5))
    fresh.set_state(state)
    again = next(fresh)
    assert all(np.array_equal(again[key], expected[key]) for key in expected)
    with pytest.raises(ResumeError, match="other latents or other batch settings"):
        iter(FlowBatches(pictures, batch_size=2, seed=4)).set_state(state)


def test_impossible_batches():
    with pytest.raises(ConfigError, match="batch_size is 0"):
        FlowBatches(data(), batch_size=0)
    with pytest.raises(ConfigError, match="sampling"):
        FlowBatches(data(), batch_size=1, sampling="even")
