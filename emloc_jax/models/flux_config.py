"""The shape of a FLUX transformer, to and from the config.json of diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.models._hf_keys import refuse_options, refuse_quantised, require_positive

__all__ = ["FLUX_CLASSES", "FluxConfig"]

FLUX_CLASSES = ("FluxTransformer2DModel",)

# Key of diffusers -> (field here, the value that an absent key stands for).
_KEYS: dict[str, tuple[str, Any]] = {
    "in_channels": ("in_channels", 64),
    "num_layers": ("num_layers", 19),
    "num_single_layers": ("num_single_layers", 38),
    "attention_head_dim": ("head_dim", 128),
    "num_attention_heads": ("num_heads", 24),
    "joint_attention_dim": ("prompt_dim", 4096),
    "pooled_projection_dim": ("pooled_dim", 768),
    "guidance_embeds": ("guidance_embeds", False),
    "axes_dims_rope": ("axes_dims", (16, 56, 56)),
}


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Everything that fixes the function of a FLUX transformer.

    Hashable: it can be an attribute of a linen module and a static argument under jit. The
    defaults are those of diffusers, FLUX.1's sizes.

    Attributes:
        in_channels: width of a packed latent token, C.
        out_channels: width of what is predicted for it.
        num_layers: double-stream blocks: text and image have weights of their own.
        num_single_layers: single-stream blocks: one set of weights for both.
        head_dim: width of one attention head.
        num_heads: heads; the residual stream is ``num_heads · head_dim`` wide, D.
        prompt_dim: width of a prompt token's embedding (the T5 encoder's), E.
        pooled_dim: width of the pooled prompt embedding (CLIP's), P.
        guidance_embeds: the model takes a guidance scale as an input (FLUX.1-dev).
        axes_dims: features of a head that each axis of the position ids rotates; even, and
            ``head_dim`` together.

    Example:
        >>> from emloc_jax.models import FluxConfig
        >>> config = FluxConfig.from_hf({"_class_name": "FluxTransformer2DModel",
        ...                              "guidance_embeds": True})
        >>> config.hidden_size, config.layer_depths
        (3072, {'double_layers': 19, 'single_layers': 38})
        >>> FluxConfig.from_hf(config.to_hf()) == config
        True
    """

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    head_dim: int = 128
    num_heads: int = 24
    prompt_dim: int = 4096
    pooled_dim: int = 768
    guidance_embeds: bool = False
    axes_dims: tuple[int, ...] = (16, 56, 56)

    model_type = "flux"

    def __post_init__(self):
        sizes = ("in_channels", "out_channels", "num_layers", "num_single_layers", "head_dim")
        require_positive(self, (*sizes, "num_heads", "prompt_dim", "pooled_dim"))
        whole = all(isinstance(size, int) and size > 0 for size in self.axes_dims)
        if not whole or any(size % 2 for size in self.axes_dims):
            raise ConfigError(
                f"axes_dims={self.axes_dims!r} was given where even positive numbers are needed: "
                "features are rotated in pairs. Correct the config."
            )
        if sum(self.axes_dims) != self.head_dim:
            raise ConfigError(
                f"axes_dims={self.axes_dims} make {sum(self.axes_dims)} features, but a head has "
                f"{self.head_dim}. Correct the config."
            )

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, D."""
        return self.num_heads * self.head_dim

    @property
    def intermediate_size(self) -> int:
        """Width of every MLP."""
        return 4 * self.hidden_size

    @property
    def layer_depths(self) -> dict[str, int]:
        """Blocks of each kind, by their name in parameter paths."""
        return {"double_layers": self.num_layers, "single_layers": self.num_single_layers}

    @property
    def class_name(self) -> str:
        """The class of diffusers that this is."""
        return FLUX_CLASSES[0]

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> FluxConfig:
        """The config that the ``config.json`` of a diffusers transformer folder describes.

        Args:
            hf_config: the parsed ``config.json``.

        Returns:
            The equivalent ``FluxConfig``.

        Raises:
            UnsupportedArchitectureError: another class, a quantised checkpoint, or an option that
                is not implemented.
            ConfigError: a size is impossible.
        """
        hf = hf_config
        if hf.get("_class_name") not in FLUX_CLASSES:
            raise UnsupportedArchitectureError(
                f"A diffusers model of class {hf.get('_class_name')!r} was asked for; of diffusers "
                f"{', '.join(FLUX_CLASSES)} is supported. Use a model of this class."
            )
        refuse_quantised(hf)
        refuse_options(hf, {"patch_size": (1,)})
        values = {field: hf.get(key, default) for key, (field, default) in _KEYS.items()}
        values["axes_dims"] = tuple(values["axes_dims"])
        values["out_channels"] = hf.get("out_channels") or values["in_channels"]
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model.

        Returns:
            A new dict of JSON values.
        """
        hf = {key: getattr(self, field) for key, (field, _) in _KEYS.items()}
        hf["axes_dims_rope"] = list(self.axes_dims)
        return {
            "_class_name": self.class_name,
            **hf,
            "out_channels": self.out_channels,
            "patch_size": 1,
        }
