"""ViT and SigLIP against torch, with every head; and in every form of their layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError, UnsupportedArchitectureError
from emloc_jax.kernels import LowRankKernel, find_kernels, intercept
from emloc_jax.models import (
    VisionConfig,
    VisionEncoder,
    block_stack,
    hf_tensor_names,
    stack_layers,
    unstack_layers,
)
from tests.models.torch_vision import (
    ENCODERS,
    images,
    our_config,
    our_params,
    torch_model,
    torch_outputs,
)

every_variant = pytest.mark.parametrize("variant", ENCODERS)


def torch_result(variant, pixels):
    outputs = torch_outputs(variant, pixels)
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).numpy()


@every_variant
def test_names_are_torch_s_own_and_cover_the_tree(variant):
    config = our_config(variant)
    state = {name: tuple(t.shape) for name, t in torch_model(variant).state_dict().items()}
    state = {n: s for n, s in state.items() if not n.startswith(("text_model.", "logit_"))}
    assert {t.class_name: t.shape for t in hf_tensor_names(config).values()} == state
    init = VisionEncoder(config).init
    tree = jax.eval_shape(init, jax.random.key(0), images(variant))["params"]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(np.shape, our_params(variant))


@every_variant
def test_results_are_torch_s(variant):
    model, pixels = VisionEncoder(our_config(variant), scan_layers=True), images(variant)
    params = {"params": stack_layers(our_params(variant), 2)}
    ours = jax.jit(model.apply)(params, pixels)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, torch_result(variant, pixels), atol=1e-4)


@pytest.mark.parametrize("variant", ["vit", "siglip"])
def test_the_pooler_is_torch_s(variant):
    model, params = VisionEncoder(our_config(variant)), {"params": our_params(variant)}
    hidden = model.apply(params, images(variant), method="hidden")
    pooled = model.apply(params, hidden, method="pool")
    theirs = torch_outputs(variant, images(variant)).pooler_output
    np.testing.assert_allclose(pooled, theirs.numpy(), atol=1e-4)


def test_scanned_and_rematerialised_equal_plain():
    pixels, params = images("siglip-labels"), our_params("siglip-labels")

    def gradient(model, params):
        def loss(params):
            return jnp.sum(jnp.sin(model.apply({"params": params}, pixels)))

        return jax.jit(jax.grad(loss))(params)

    config = our_config("siglip-labels")
    plain = gradient(VisionEncoder(config), params)
    model = VisionEncoder(config, scan_layers=True, remat=True)
    scanned = unstack_layers(gradient(model, stack_layers(params, 2)), 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, np.abs(b).max())),
        scanned,
        plain,
    )


@pytest.mark.parametrize("variant, scan", [("vit-labels", True), ("siglip", False)])
def test_block_stack_composes_to_the_model(variant, scan):
    model, params = VisionEncoder(our_config(variant), scan_layers=scan), our_params(variant)
    params = stack_layers(params, 2) if scan else params
    expected = jax.jit(model.apply)({"params": params}, images(variant))
    composed = jax.jit(block_stack(model))(params, images(variant))
    np.testing.assert_allclose(composed, expected, atol=2e-5)


def test_kernels_are_found_and_take_the_fast_path():
    model, params = VisionEncoder(our_config("vit-labels")), our_params("vit-labels")
    pixels = images("vit-labels")
    kernels = find_kernels(model.apply, params, pixels)
    assert len(kernels) == 12 + 2 and kernels["embed_patches/kernel"].handler == "Conv"
    assert all(spec.handler is not None for spec in kernels.values())
    names = ("query", "key", "value")
    assert len({kernels[f"layers/1/attention/{n}/kernel"].input_group for n in names}) == 1

    def factor(path, leaf):
        if path[-1].key != "kernel" or leaf.ndim != 2:
            return leaf
        u, s, vt = np.linalg.svd(leaf, full_matrices=False)
        return LowRankKernel(jnp.asarray(u[:, :3] * s[:3]), jnp.asarray(vt[:3]))

    factored = {"params": jax.tree_util.tree_map_with_path(factor, params)}
    slow = jax.jit(model.apply)(factored, pixels)
    fast = jax.jit(intercept(model.apply))(factored, pixels)
    np.testing.assert_allclose(fast, slow, atol=5e-5)


def test_bf16_computes_in_bf16_and_returns_fp32():
    model, params = VisionEncoder(our_config("vit"), dtype=jnp.bfloat16), our_params("vit")
    params, pixels = {"params": params}, images("vit")
    hidden = jax.eval_shape(lambda p, x: model.apply(p, x, method="hidden"), params, pixels)
    ours, exact = jax.jit(model.apply)(params, pixels), torch_result("vit", pixels)
    assert (hidden.dtype, ours.dtype) == (jnp.bfloat16, jnp.float32)
    assert 1e-4 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 3e-2


@every_variant
def test_there_and_back(variant):
    config = our_config(variant)
    assert VisionConfig.from_hf(config.to_hf()) == config and isinstance(hash(config), int)


def test_images_of_another_size_are_refused():
    model, params = VisionEncoder(our_config("vit")), {"params": our_params("vit")}
    with pytest.raises(DataError, match=r"\(2, 3, 12, 12\).*\(batch, 12, 12, 3\)"):
        model.apply(params, np.zeros((2, 3, 12, 12), np.float32))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hidden_act="mish"), "'mish'"),
        (dict(pooler_act="relu"), "pooler_act='relu'"),
        (dict(pooler_output_size=7), "pooler_output_size=7"),
        (dict(architectures=["ViTForMaskedImageModeling"]), "ViTForImageClassification"),
        (dict(model_type="beit"), "'beit'"),
    ],
)
def test_unimplemented_options_are_refused_by_name(changes, words):
    with pytest.raises(UnsupportedArchitectureError, match=words):
        VisionConfig.from_hf(our_config("vit").to_hf() | changes)


def test_impossible_values_are_refused():
    config = our_config("vit")
    for changes, words in (
        (dict(patch_size=(5, 4)), "patch_size"),
        (dict(num_heads=5), "num_heads=5"),
        (dict(num_labels=3), "num_labels=3"),
        (dict(norm_type="batch_norm"), "batch_norm"),
    ):
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(config, **changes)
