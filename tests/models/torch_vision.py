"""Tiny torch image encoders and InternVLs, and their weights in our tree."""

import functools

import numpy as np
import torch
import transformers

from emloc_jax.models import config_from_hf
from tests.models.torch_tree import tree_of

SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
VISION = SIZES | dict(image_size=12, patch_size=4)
TALL = SIZES | dict(image_size=[12, 8], patch_size=[4, 2])
INTERN = SIZES | dict(image_size=[16, 16], patch_size=[4, 4])
TEXT = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
SIGLIP_TEXT = SIZES | dict(vocab_size=11, bos_token_id=1, eos_token_id=2)
IMAGE = 60  # the image token
# name -> (class, its config)
VARIANTS = {
    "vit": ("ViTModel", VISION),
    "vit-tall": ("ViTModel", TALL | dict(qkv_bias=False, hidden_act="gelu_new")),
    "vit-labels": ("ViTForImageClassification", VISION | dict(num_labels=5)),
    "siglip": ("SiglipVisionModel", VISION),
    "siglip-headless": ("SiglipVisionModel", VISION | dict(vision_use_head=False)),
    "siglip-both": ("SiglipModel", dict(vision_config=VISION, text_config=SIGLIP_TEXT)),
    "siglip-labels": (
        "SiglipForImageClassification",
        dict(vision_config=VISION, text_config=SIGLIP_TEXT, num_labels=3),
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        dict(
            vision_config=INTERN, text_config=TEXT | dict(model_type="qwen2"), image_seq_length=4,
            image_token_id=IMAGE, tie_word_embeddings=False,
        ),
    ),
    "internvl-6b": (  # the large image encoder: RMS norms, normed queries; a tied head
        "InternVLForConditionalGeneration",
        dict(
            vision_config=INTERN
            | dict(norm_type="rms_norm", use_qk_norm=True, attention_bias=True, num_channels=1),
            text_config=TEXT | dict(model_type="llama"), image_token_id=IMAGE, image_seq_length=4,
            tie_word_embeddings=True,
        ),
    ),
    "internvl-normed": (
        "InternVLForConditionalGeneration",
        dict(
            vision_config=INTERN | dict(use_mean_pooling=False),
            text_config=TEXT | dict(model_type="qwen3", head_dim=8), image_token_id=IMAGE,
            downsample_ratio=0.25, image_seq_length=1, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip
ENCODERS = [name for name in VARIANTS if not name.startswith("internvl")]
INTERNVLS = [name for name in VARIANTS if name.startswith("internvl")]


@functools.cache
def torch_model(variant):
    """A randomly initialised torch model with no parameter at its trivial value."""
    name, options = VARIANTS[variant]
    kind = getattr(transformers, name)
    config = kind.config_class(**options)
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms are born 1, biases and class tokens 0: all would hide mistakes.
            parameter.add_(0.1 * torch.randn_like(parameter))
    config.architectures = [name]
    return model


def our_config(variant):
    return config_from_hf(torch_model(variant).config.to_dict(), list(disk_names(variant)))


def disk_names(variant):
    """What a bare ViT's pooler is told by."""
    return torch_model(variant).state_dict()


@functools.cache
def our_params(variant):
    return tree_of(torch_model(variant), our_config(variant))


def images(variant, count=3, seed=0):
    """Pixels with the channels last."""
    config = our_config(variant)
    vision = getattr(config, "vision", config)
    shape = (count, *vision.image_size, vision.num_channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_first(pixels):
    return torch.asarray(np.moveaxis(pixels, -1, 1).copy())


def torch_outputs(variant, pixels, **inputs):
    with torch.no_grad():
        model = torch_model(variant)
        model = model.vision_model if variant == "siglip-both" else model
        return model(pixel_values=channels_first(pixels), **inputs)


def prompts(variant, tiles=((1, 2), (0, 1)), length=24, seed=0):
    """Rows with images of so many tiles in between words; tokens, segments, tiles that are real.

    Each row has one image per entry, and every entry is the image's number of tiles.
    """
    config, rng = our_config(variant), np.random.default_rng(seed)
    rows = []
    for row in tiles:
        words = [list(rng.integers(1, IMAGE - 1, 2)) for _ in range(len(row) + 1)]
        tokens = words[0]
        for count, text in zip(row, words[1:], strict=True):
            tokens = tokens + [IMAGE] * (count * config.tile_tokens) + text
        rows.append(tokens)
    batch = np.zeros((len(rows), length), np.int32)
    for row, tokens in enumerate(rows):
        batch[row, : len(tokens)] = tokens
    segments = (np.arange(length) < np.array([[len(row)] for row in rows])).astype(np.int32)
    return batch, segments, np.array([sum(row) for row in tiles])


def torch_logits(variant, tokens, segments, pixels, counts):
    """Of the torch model, which takes the real tiles of all rows in one axis."""
    real = np.concatenate([own[:count] for own, count in zip(pixels, counts, strict=True)])
    return torch_outputs(
        variant,
        real,
        input_ids=torch.asarray(tokens).long(),
        attention_mask=torch.asarray(segments).long(),
    ).logits.numpy()
