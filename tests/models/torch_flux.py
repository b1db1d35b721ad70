"""Tiny torch FLUX transformers, their weights in our tree, and inputs for both."""

import functools

import diffusers
import numpy as np
import torch

from emloc_jax.models import config_from_hf, grid_ids
from tests.models.torch_tree import tree_of

SIZES = dict(
    in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
# name -> what differs
VARIANTS = {"guided": dict(guidance_embeds=True), "plain": dict(out_channels=6, num_layers=1)}
BATCH, HEIGHT, WIDTH, WORDS = 2, 3, 2, 5


@functools.cache
def torch_flux(variant, **changes):
    """A randomly initialised torch model with no parameter at its trivial value."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**(SIZES | VARIANTS[variant] | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def our_config(variant):
    return config_from_hf(hf_config(variant))


def hf_config(variant):
    return {"_class_name": "FluxTransformer2DModel", **torch_flux(variant).config}


def our_params(variant):
    return tree_of(torch_flux(variant), our_config(variant))


def random_inputs(config, batch=BATCH, seed=0):
    """What `Flux` is called on, by name."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    inputs = dict(
        latents=normal(batch, HEIGHT * WIDTH, config.in_channels),
        timesteps=rng.uniform(size=batch).astype(np.float32),
        prompt_embeds=normal(batch, WORDS, config.prompt_dim),
        pooled_prompt_embeds=normal(batch, config.pooled_dim),
        image_ids=grid_ids(HEIGHT, WIDTH),
    )
    if config.guidance_embeds:
        inputs["guidance"] = np.full(batch, 3.5, np.float32)
    return inputs


def torch_output(model, inputs):
    """What the torch model makes of the same inputs, for a backward pass."""
    tensors = {name: torch.asarray(value) for name, value in inputs.items()}
    return model(
        hidden_states=tensors["latents"],
        timestep=tensors["timesteps"],
        encoder_hidden_states=tensors["prompt_embeds"],
        pooled_projections=tensors["pooled_prompt_embeds"],
        img_ids=tensors["image_ids"],
        txt_ids=tensors.get("text_ids", torch.zeros(inputs["prompt_embeds"].shape[1], 3)),
        guidance=tensors.get("guidance"),
    ).sample


def torch_velocity(model, inputs):
    """The same as an array."""
    with torch.no_grad():
        return torch_output(model, inputs).numpy()
