"""The FLUX transformer against torch, in every layout, and what it refuses."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from emloc_jax.errors import ConfigError, DataError, UnsupportedArchitectureError
from emloc_jax.kernels import find_kernels
from emloc_jax.models import (
    Flux,
    FluxConfig,
    config_from_hf,
    grid_ids,
    hf_tensor_names,
    layer_depths,
    pack_latents,
    stack_layers,
    unpack_latents,
    unstack_layers,
)
from tests.models.torch_flux import (
    VARIANTS,
    hf_config,
    our_config,
    our_params,
    random_inputs,
    torch_flux,
    torch_output,
    torch_velocity,
)
from tests.models.torch_tree import tree_of


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", [False, True])
def test_velocity_is_torch_s(variant, scan):
    config, params = our_config(variant), our_params(variant)
    params = stack_layers(params, layer_depths(config)) if scan else params
    inputs = random_inputs(config)
    ours = jax.jit(Flux(config, scan_layers=scan).apply)({"params": params}, **inputs)
    theirs = torch_velocity(torch_flux(variant), inputs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_positions_matter_and_may_differ_between_rows():
    config, params = our_config("plain"), our_params("plain")
    inputs = random_inputs(config)
    rng = np.random.default_rng(1)
    inputs |= {
        "image_ids": rng.integers(0, 60, inputs["image_ids"].shape).astype(np.float32),
        "text_ids": rng.integers(0, 60, (inputs["prompt_embeds"].shape[1], 3)).astype(np.float32),
    }
    params = stack_layers(params, layer_depths(config))
    apply = jax.jit(Flux(config, scan_layers=True).apply)
    ours = apply({"params": params}, **inputs)
    theirs = torch_velocity(torch_flux("plain"), inputs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    ids = np.stack((inputs["image_ids"], grid_ids(3, 2)))
    mixed = apply({"params": params}, **(inputs | {"image_ids": ids}))
    np.testing.assert_allclose(mixed[0], ours[0], rtol=0, atol=1e-5)
    assert np.abs(mixed[1] - ours[1]).max() > 1e-2


def test_gradients_are_torch_s():
    """Scanned and with remat, which is how it is trained."""
    config, inputs = our_config("guided"), random_inputs(our_config("guided"))
    depths, params = layer_depths(config), our_params("guided")
    model = Flux(config, scan_layers=True, remat=True)
    loss = lambda p: jnp.mean(model.apply({"params": p}, **inputs) ** 2)  # noqa: E731
    ours = unstack_layers(jax.jit(jax.grad(loss))(stack_layers(params, depths)), depths)

    theirs = copy.deepcopy(torch_flux("guided"))
    (torch_output(theirs, inputs) ** 2).mean().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        ours,
        tree_of(theirs, config),
    )


def test_fresh_parameters_have_the_names_and_shapes_of_torch_s():
    config, inputs = our_config("guided"), random_inputs(our_config("guided"))
    shapes = jax.eval_shape(lambda: Flux(config).init(jax.random.key(0), **inputs))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, our_params("guided"))
    theirs = {name: tuple(t.shape) for name, t in torch_flux("guided").state_dict().items()}
    assert {t.name: t.shape for t in hf_tensor_names(config).values()} == theirs


@pytest.mark.parametrize("scan", [False, True])
def test_every_linear_layer_is_a_kernel_with_a_fast_path(scan):
    config, inputs = our_config("guided"), random_inputs(our_config("guided"))
    params = our_params("guided")
    params = stack_layers(params, layer_depths(config)) if scan else params
    kernels = find_kernels(Flux(config, scan_layers=scan).apply, params, **inputs)
    assert all(spec.handler == "Dense" for spec in kernels.values())
    linear = sum(isinstance(m, torch.nn.Linear) for m in torch_flux("guided").modules())
    assert sum(int(np.prod(spec.stack_shape)) for spec in kernels.values()) == linear
    block = "single_layers" if scan else "single_layers/1"
    group = {kernels[f"{block}/{name}/kernel"].input_group for name in ("attn/to_q", "proj_mlp")}
    assert len(group) == 1  # what reads the same input shares one second moment


def test_bf16_stays_close():
    config, inputs = our_config("guided"), random_inputs(our_config("guided"))
    params = stack_layers(our_params("guided"), layer_depths(config))
    rough = Flux(config, dtype=jnp.bfloat16, scan_layers=True)
    rough = jax.jit(rough.apply)({"params": params}, **inputs)
    exact = torch_velocity(torch_flux("guided"), inputs)
    assert rough.dtype == jnp.float32
    assert np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)


def test_config_there_and_back():
    for variant in VARIANTS:
        config = our_config(variant)
        assert FluxConfig.from_hf(config.to_hf()) == config
        said = hf_config(variant) | {"axes_dims_rope": list(hf_config(variant)["axes_dims_rope"])}
        same = {key: said[key] for key in config.to_hf() if said[key] is not None}
        assert {key: config.to_hf()[key] for key in same} == same


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"_class_name": "UNet2DConditionModel"}, UnsupportedArchitectureError, "UNet2DCondition"),
        ({"patch_size": 2}, UnsupportedArchitectureError, "patch_size=2"),
        ({"quantization_config": {"quant_method": "nf4"}}, UnsupportedArchitectureError, "nf4"),
        ({"num_layers": 0}, ConfigError, "num_layers=0"),
        ({"axes_dims_rope": [4, 6, 8]}, ConfigError, "make 18 features"),
        ({"axes_dims_rope": [5, 5, 6]}, ConfigError, "even"),
    ],
)
def test_refused_configs(changes, error, words):
    with pytest.raises(error, match=words):
        config_from_hf(hf_config("plain") | changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_guidance_is_neither_forgotten_nor_ignored(variant):
    config = our_config(variant)
    inputs = random_inputs(config)
    if inputs.pop("guidance", None) is None:
        inputs["guidance"] = np.ones(2, np.float32)
    with pytest.raises(ConfigError, match="guidance_embeds"):
        Flux(config).apply({"params": our_params(variant)}, **inputs)


def test_packing_is_diffusers():
    from diffusers import FluxPipeline

    pictures = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    channels_first = torch.asarray(pictures.transpose(0, 3, 1, 2).copy())
    theirs = FluxPipeline._pack_latents(channels_first, 2, 3, 4, 6).numpy()
    np.testing.assert_array_equal(pack_latents(pictures), theirs)
    np.testing.assert_array_equal(unpack_latents(pack_latents(pictures), 2, 3), pictures)
    ids = FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32).numpy()
    np.testing.assert_array_equal(grid_ids(2, 3), ids)
    with pytest.raises(DataError, match="even H and W"):
        pack_latents(pictures[:, :3])
