"""Images as numbers: parity with transformers' own processors, tiling, damaged files."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from emloc_jax.errors import CheckpointError, ConfigError, DataError
from emloc_jax.training import ImageProcessor, image_size, open_image, tile_grid


def picture(width, height, seed=0):
    """A smooth image with noise."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    noise = rng.integers(0, 55, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


@pytest.mark.parametrize("kind", [ViTImageProcessorPil, SiglipImageProcessorPil])
@pytest.mark.parametrize(
    "options", [{}, dict(do_normalize=False), dict(resample=3, image_std=[1, 2, 3])]
)
def test_whole_images_are_those_of_transformers(tmp_path, kind, options):
    theirs = kind(size={"height": 20, "width": 24}, **options)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_folder(tmp_path)
    for size in ((31, 17), (24, 20), (5, 90)):
        image = picture(*size)
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(ours.pixels(image), np.moveaxis(expected, 0, -1), atol=1e-5)


@pytest.mark.parametrize("limits", [(1, 12), (2, 6), (1, 1)])
def test_tiles_are_those_of_transformers(tmp_path, limits):
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, min_patches=limits[0], max_patches=limits[1]
    )
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_folder(tmp_path, tiled=True)
    for size in ((16, 16), (40, 20), (20, 61), (90, 10), (33, 32), (8, 8), (100, 100)):
        image = picture(*size)
        found = theirs(image, crop_to_patches=True, return_tensors="np")
        tiles = ours.tiles(image)
        assert len(tiles) == found["num_patches"][0] == ours.tile_count(image.height, image.width)
        expected = np.moveaxis(found["pixel_values"], 1, -1)
        np.testing.assert_allclose(tiles, expected, atol=1e-5)


def test_the_grid_is_that_of_transformers_for_many_shapes():
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as reference

    rng = np.random.default_rng(0)
    for height, width in rng.integers(10, 2000, (300, 2)):
        for least, most in ((1, 12), (3, 7), (1, 40)):
            columns, rows = reference.get_optimal_tiled_canvas(
                (int(height), int(width)), (448, 448), least, most
            )
            found = tile_grid(height, width, (448, 448), least=least, most=most)
            assert found == (rows, columns)


def test_settings_of_transformers_5_lie_in_another_file(tmp_path):
    said = {"image_processor": {"image_processor_type": "GotOcr2ImageProcessorFast", "size": 32}}
    (tmp_path / "processor_config.json").write_text(json.dumps(said))
    found = ImageProcessor.from_folder(tmp_path, tiled=True)
    assert (found.size, found.resample, found.most) == ((32, 32), 3, 12)


@pytest.mark.parametrize(
    "said, words",
    [
        ({"do_center_crop": True}, "do_center_crop=True"),
        ({"size": {"shortest_edge": 224}}, "shortest_edge"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"image_std": [0.5, 0, 0.5]}, "must be positive"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(said, words):
    with pytest.raises(ConfigError, match=words):
        ImageProcessor.from_hf(said)


def test_a_folder_without_settings(tmp_path):
    with pytest.raises(CheckpointError, match="holds no preprocessor_config.json"):
        ImageProcessor.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ImageProcessor.from_folder(tmp_path)


def test_images_are_turned_and_in_colour(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(30, 20).save(tmp_path / "turned.jpg", exif=turned)
    assert open_image(tmp_path / "turned.jpg").size == (20, 30)
    assert image_size(tmp_path / "turned.jpg") == (30, 20)
    for mode in ("L", "P", "RGBA", "1", "I;16"):
        Image.new(mode, (7, 5)).save(tmp_path / f"{mode[0]}.png")
        image = open_image(tmp_path / f"{mode[0]}.png")
        assert (image.mode, image.size) == ("RGB", (7, 5))
        assert image_size(tmp_path / f"{mode[0]}.png") == (5, 7)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    picture(60, 60).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "half.png", "missing.png", "."):
        with pytest.raises(DataError, match=rf"b.jsonl:3: the image .*{name} cannot be read"):
            open_image(tmp_path / name, "b.jsonl:3")
    for name in ("text.png", "missing.png"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            image_size(tmp_path / name)
