"""InternVL against torch: rows with one and several images, tiles that no row reads, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError, UnsupportedArchitectureError
from emloc_jax.kernels import find_kernels
from emloc_jax.models import (
    InternVL,
    InternVLConfig,
    block_stack,
    check_images,
    generate,
    hf_storage,
    hf_tensor_names,
    layer_depths,
    stack_layers,
    unstack_layers,
)
from tests.models.torch_vision import (
    IMAGE,
    INTERNVLS,
    channels_first,
    images,
    our_config,
    our_params,
    prompts,
    torch_logits,
    torch_model,
)

every_variant = pytest.mark.parametrize("variant", INTERNVLS)


def tiles_of(variant, rows=2, tiles=3):
    """Tiles for every row, (rows, tiles, height, width, channels)."""
    return images(variant, rows * tiles).reshape(rows, tiles, *images(variant, 1).shape[1:])


def scanned(variant):
    return {"params": stack_layers(our_params(variant), layer_depths(our_config(variant)))}


@every_variant
def test_names_are_torch_s_own_and_cover_the_tree(variant):
    config = our_config(variant)
    state = {name: tuple(t.shape) for name, t in torch_model(variant).state_dict().items()}
    for copy in hf_storage(config).copies:
        state.pop(copy, None)
    assert {t.class_name: t.shape for t in hf_tensor_names(config).values()} == state
    tokens, _, _ = prompts(variant)
    init = InternVL(config).init
    tree = jax.eval_shape(init, jax.random.key(0), tokens, pixels=tiles_of(variant))["params"]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(np.shape, our_params(variant))


@every_variant
def test_one_image_several_images_and_padding(variant):
    model, pixels = InternVL(our_config(variant), scan_layers=True), tiles_of(variant)
    tokens, segments, counts = prompts(variant)  # 3 tiles in two images, and 1 in one
    apply = jax.jit(model.apply)
    ours = apply(scanned(variant), tokens, None, segments, pixels)
    theirs = torch_logits(variant, tokens, segments, pixels, counts)
    real = segments > 0
    assert ours.dtype == np.float32
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=1e-4)
    # What lies in tiles that a row does not use is never read.
    pixels[1, 1:] = np.nan if variant == "internvl" else 7.0
    again = apply(scanned(variant), tokens, None, segments, pixels)
    np.testing.assert_array_equal(np.asarray(again)[real], np.asarray(ours)[real])


def test_text_alone_needs_no_pixels():
    import torch

    tokens = np.random.default_rng(0).integers(1, IMAGE - 1, (2, 9), dtype=np.int32)
    model = InternVL(our_config("internvl"))
    ours = jax.jit(model.apply)({"params": our_params("internvl")}, tokens)
    with torch.no_grad():
        theirs = torch_model("internvl")(torch.asarray(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_unrolled_tree_comes_back_and_computes_the_same():
    config, pixels = our_config("internvl"), tiles_of("internvl")
    tokens, segments, _ = prompts("internvl")
    stacked = scanned("internvl")["params"]
    assert stacked["vision"]["layers"]["mlp"]["output"]["kernel"].shape == (2, 40, 24)
    params = unstack_layers(stacked, layer_depths(config))
    jax.tree.map(np.testing.assert_array_equal, params, our_params("internvl"))
    found = [
        jax.jit(InternVL(config, scan_layers=scan, remat=True).apply)(
            {"params": tree}, tokens, None, segments, pixels
        )
        for scan, tree in ((False, params), (True, stacked))
    ]
    np.testing.assert_allclose(*found, atol=2e-5)


def test_block_stack_composes_to_the_model():
    model, pixels = InternVL(our_config("internvl")), tiles_of("internvl")
    tokens, segments, _ = prompts("internvl")
    params = our_params("internvl")
    expected = jax.jit(model.apply)({"params": params}, tokens, None, segments, pixels)
    composed = jax.jit(block_stack(model))(params, tokens, None, segments, pixels)
    np.testing.assert_allclose(composed, expected, atol=2e-5)


def test_kernels_of_all_three_parts_are_found():
    model, params = InternVL(our_config("internvl"), scan_layers=True), scanned("internvl")
    kernels = find_kernels(
        model.apply, params["params"], prompts("internvl")[0], pixels=tiles_of("internvl")
    )
    parts = [sum(p.startswith(part) for p in kernels) for part in ("vision/", "projector/", "lay")]
    assert parts == [7, 2, 7] and "vision/embed_patches/kernel" in kernels
    assert all(spec.handler is not None for spec in kernels.values())


def test_more_image_tokens_than_features_are_seen_and_refused():
    tokens, segments, counts = prompts("internvl")
    model, pixels = InternVL(our_config("internvl"), scan_layers=True), tiles_of("internvl")
    check_images(model.config, tokens, counts)
    wrong = np.where(np.arange(24) < 14, IMAGE, tokens).astype(np.int32)
    logits = jax.jit(model.apply)(scanned("internvl"), wrong, None, segments, pixels)
    assert np.isnan(np.asarray(logits)[0, -1]).all()
    for given, tiles in ((wrong, counts), (tokens, counts + [0, 1])):
        with pytest.raises(DataError, match=r"(row 1|b\.jsonl:2): \d+ image tokens for"):
            check_images(model.config, given, tiles, ["row 1", "b.jsonl:2"])
    with pytest.raises(DataError, match="batch, tiles"):
        model.apply(scanned("internvl"), tokens, pixels=pixels[0])


@every_variant
def test_there_and_back(variant):
    config = our_config(variant)
    assert InternVLConfig.from_hf(config.to_hf()) == config and isinstance(hash(config), int)


def test_what_is_not_implemented_is_refused_by_name():
    hf = our_config("internvl").to_hf()
    for changes, words in (
        (dict(vision_config=hf["vision_config"] | {"model_type": "clip_vision_model"}), "clip_vis"),
        (dict(text_config=hf["text_config"] | {"model_type": "gpt_oss"}), "language model.*gpt_o"),
        (dict(vision_feature_layer=-2), "vision_feature_layer=-2"),
        (dict(vision_feature_select_strategy="full"), "'full'"),
        (dict(architectures=["InternVLModel"]), "InternVLForConditionalGeneration"),
    ):
        with pytest.raises(UnsupportedArchitectureError, match=words):
            InternVLConfig.from_hf(hf | changes)
    for changes, words in ((dict(image_seq_length=9), "=9"), (dict(image_token_id=99), "=99")):
        with pytest.raises(ConfigError, match=words):
            InternVLConfig.from_hf(hf | changes)
    config = our_config("internvl")
    for changes in (dict(shuffle=3), dict(vision=our_config("vit"))):
        with pytest.raises(ConfigError):
            dataclasses.replace(config, **changes)


def test_greedy_answers_to_prompts_with_images_are_torch_s():
    """One prompt with two images, one with one, one without; padded on the left, as they come."""
    import torch

    variant = "internvl"
    model, pixels = InternVL(our_config(variant)), tiles_of(variant)
    tokens, segments, counts = prompts(variant)
    given = [row[: segments[i].sum()].tolist() for i, row in enumerate(tokens)] + [[5, 9, 11]]
    tiles = [own[:count] for own, count in zip(pixels, counts, strict=True)] + [pixels[0, :0]]
    params = our_params(variant)
    ours = generate(model, params, given, max_new_tokens=4, pad_to=8, pixels=tiles)
    for prompt, own, answer in zip(given, tiles, ours, strict=True):
        images = dict(pixel_values=channels_first(own)) if len(own) else {}
        with torch.no_grad():
            found = torch_model(variant).generate(
                input_ids=torch.asarray([prompt]), max_new_tokens=4, do_sample=False, **images
            )
        assert answer == found[0, len(prompt) :].tolist()
    with pytest.raises(DataError, match="prompt 1: 12 image tokens for 1 tiles"):
        generate(model, params, given[:1], max_new_tokens=1, pixels=[pixels[0, :1]])
