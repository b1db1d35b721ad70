"""An InternVL and a FLUX that are small enough to allocate, as config.json describes them."""

import functools

from emloc_jax.memory import Planner, Setting, abstract_model
from tests.memory.models import CONFIG

IMAGE_TOKEN = 95
INTERNVL = {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    },
    "text_config": {k: v for k, v in CONFIG.items() if k != "architectures"},
    "image_token_id": IMAGE_TOKEN,
    "image_seq_length": 4,
    "tie_word_embeddings": False,
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
# A few kernels of every part: each costs time to compile.
TILED = ("vision/layers/mlp/output", "layers/self_attn/k_proj", "layers/mlp/down_proj")
DRAWN = ("double_layers/ff/inner", "single_layers/attn/to_q")
WHOLE = Setting(batch_size=2, length=16, lora_rank=2, chunk=16, stream=False, calibration_rows=2)
# name -> (config.json, setting)
CASES = {
    "internvl": (INTERNVL, WHOLE.replace(tiles=3, where=TILED, lora_where=TILED)),
    "flux": (FLUX, WHOLE.replace(latents=6, where=DRAWN, lora_where=DRAWN)),
}


@functools.cache
def tiny_case(name):
    """A planner of the abstract model of a case, in bf16, and a setting for it."""
    config, setting = CASES[name]
    return Planner(abstract_model(config, name=name)), setting


def wide(name):
    """The config of a case with larger blocks, for what is only compiled."""
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    heads = dict(num_attention_heads=4)
    if name == "flux":
        return FLUX | dict(attention_head_dim=64, axes_dims_rope=[16, 24, 24], **heads)
    return INTERNVL | {
        "vision_config": INTERNVL["vision_config"] | sizes | heads,
        "text_config": INTERNVL["text_config"] | sizes | heads | dict(num_key_value_heads=2),
    }
