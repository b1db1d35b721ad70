"""The shape of a ViT, SigLIP or InternViT image encoder, to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.models._hf_keys import (
    refuse_options,
    refuse_quantised,
    require_positive,
    required,
    the_class,
)
from emloc_jax.models.activations import activation

__all__ = ["VISION_CLASSES", "VisionConfig", "pair"]


class _Family(NamedTuple):
    """What a ``model_type`` leaves unsaid."""

    bare: str  # the class without a head
    classifier: str | None
    hidden_act: str
    epsilon: float
    implemented: Mapping[str, tuple[Any, ...]]


_SIGLIP = _Family("SiglipVisionModel", None, "gelu_pytorch_tanh", 1e-6, {})
_FAMILIES = {
    "vit": _Family(
        "ViTModel", "ViTForImageClassification", "gelu", 1e-12, {"pooler_act": ("tanh",)}
    ),
    "siglip_vision_model": _SIGLIP,
    # The class with both towers, of which the vision tower is run.
    "siglip": _SIGLIP._replace(bare="SiglipModel", classifier="SiglipForImageClassification"),
    "internvl_vision": _Family(
        "InternVLVisionModel",
        None,
        "gelu",
        1e-6,
        {"use_mask_token": (False,), "use_absolute_position_embeddings": (True,)},
    ),
}
VISION_CLASSES = {
    name: tuple(kind for kind in (family.bare, family.classifier) if kind)
    for name, family in _FAMILIES.items()
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Everything that fixes the function of an image encoder, and nothing about how it is run.

    Hashable: it can be an attribute of a linen module and a static argument under jit.

    Attributes:
        hidden_size: width of the residual stream, D.
        intermediate_size: width of the MLP.
        num_layers: number of blocks, L.
        num_heads: heads; divides ``hidden_size``.
        model_type: ``'vit'``, ``'siglip_vision_model'``, ``'siglip'`` (the vision tower of a class
            with more around it) or ``'internvl_vision'``.
        head: ``'classification'``, or None for the bare encoder.
        num_labels: outputs of a classification head; None without one.
        pooler: there is a pooler. It is read by ``pool`` alone.
        image_size: (height, width) of the images, in pixels.
        patch_size: (height, width) of a patch; divides ``image_size``.
        num_channels: of the images.
        hidden_act: name of the activation.
        norm_type: of the blocks: ``'layer_norm'``, or ``'rms_norm'`` (InternViT).
        layer_norm_eps: epsilon of every norm.
        qkv_bias: biases on queries, keys and values.
        qk_norm: RMS norm of all queries and keys, over all heads at once (InternViT).
        final_norm: a norm follows the last block.
        initializer_range: standard deviation of fresh weights.

    Example:
        >>> from emloc_jax.models import VisionConfig
        >>> config = VisionConfig.from_hf({
        ...     "architectures": ["ViTForImageClassification"], "model_type": "vit",
        ...     "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        ...     "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
        ...     "id2label": {"0": "cat", "1": "dog"}})
        >>> config.head, config.num_labels, config.image_size, config.num_tokens
        ('classification', 2, (8, 8), 5)
        >>> VisionConfig.from_hf(config.to_hf()) == config
        True
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    model_type: str = "vit"
    head: str | None = None
    num_labels: int | None = None
    pooler: bool = False
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    hidden_act: str = "gelu"
    norm_type: str = "layer_norm"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    qk_norm: bool = False
    final_norm: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_channels")
        require_positive(self, sizes)
        activation(self.hidden_act)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}. "
                "Correct the config."
            )
        sides = zip(self.image_size, self.patch_size, strict=True)
        if any(patch < 1 or image < 1 or image % patch for image, patch in sides):
            raise ConfigError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}. "
                "Correct the config."
            )
        family = _FAMILIES.get(self.model_type)
        if family is None or self.norm_type not in ("layer_norm", "rms_norm"):
            raise ConfigError(
                f"model_type={self.model_type!r} with norm_type={self.norm_type!r} was given; "
                f"there are {list(_FAMILIES)} with layer_norm or rms_norm. Correct the config."
            )
        if self.head is None and self.num_labels is None:
            return
        if self.head != "classification" or family.classifier is None:
            raise ConfigError(
                f"head={self.head!r} with num_labels={self.num_labels} was given for a "
                f"{self.model_type}; only a classification head of a vit or siglip has labels. Use "
                "with_labels."
            )
        require_positive(self, ("num_labels",))

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image: (rows, columns)."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

    @property
    def class_token(self) -> bool:
        """Whether a learned token precedes the patches."""
        return not self.model_type.startswith("siglip")

    @property
    def layer_scale(self) -> bool:
        """Whether each branch of a block is scaled by a learned vector."""
        return self.model_type == "internvl_vision"

    @property
    def num_tokens(self) -> int:
        """Length of the residual stream, N."""
        return self.grid[0] * self.grid[1] + self.class_token

    @property
    def class_name(self) -> str:
        """The class of transformers that this is."""
        family = _FAMILIES[self.model_type]
        return family.classifier if self.head and family.classifier else family.bare

    def with_labels(self, num_labels: int) -> VisionConfig:
        """The same encoder under a classification head.

        Args:
            num_labels: its outputs.

        Returns:
            A new config; a ViT classifier has no pooler.

        Raises:
            ConfigError: ``num_labels`` is no positive whole number, or an InternViT.
        """
        siglip = self.model_type.startswith("siglip")
        return dataclasses.replace(
            self,
            model_type="siglip" if siglip else self.model_type,
            head="classification",
            num_labels=num_labels,
            pooler=self.pooler and siglip,
        )

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> VisionConfig:
        """The config that HF's ``config.json`` describes.

        Without ``architectures`` it is the bare encoder. Whether a bare ViT has a pooler is not
        said there, and it is taken to have one; ``load_pretrained`` looks at the tensors. Dropout
        is never applied.

        Args:
            hf_config: the parsed ``config.json``.

        Returns:
            The equivalent ``VisionConfig``.

        Raises:
            UnsupportedArchitectureError: another class, or an option that is not implemented; the
                message names it.
            ConfigError: a size is missing or impossible.
        """
        hf = dict(hf_config)
        model_type = hf.get("model_type") or _type_of(hf.get("architectures"))
        if model_type not in _FAMILIES:
            raise UnsupportedArchitectureError(
                f"An image encoder of model_type={model_type!r} was asked for. Supported are: "
                f"{', '.join(name for names in VISION_CLASSES.values() for name in names)}."
            )
        family = _FAMILIES[model_type]
        named = the_class(hf, model_type, VISION_CLASSES[model_type])
        refuse_quantised(hf)
        labels = hf.get("id2label") or range(hf.get("num_labels", 2))
        head = "classification" if named is not None and named == family.classifier else None
        own = dict(hf.get("vision_config") or {}) if model_type == "siglip" else hf
        width = required(own, "hidden_size")
        poolers = {"pooler_output_size": (width, None)} if model_type == "vit" else {}
        refuse_options(own, {**family.implemented, **poolers})
        internvl, siglip = model_type == "internvl_vision", model_type.startswith("siglip")
        return cls(
            hidden_size=width,
            intermediate_size=required(own, "intermediate_size"),
            num_layers=required(own, "num_hidden_layers"),
            num_heads=required(own, "num_attention_heads"),
            model_type=model_type,
            head=head,
            num_labels=len(labels) if head else None,
            pooler=own.get("vision_use_head", True) if siglip else not (internvl or head),
            image_size=pair(own.get("image_size", 448 if internvl else 224)),
            patch_size=pair(own.get("patch_size", 14 if internvl else 16)),
            num_channels=own.get("num_channels", 3),
            hidden_act=own.get("hidden_act", family.hidden_act),
            norm_type=own.get("norm_type", "layer_norm") if internvl else "layer_norm",
            layer_norm_eps=float(own.get("layer_norm_eps", family.epsilon)),
            qkv_bias=own.get("attention_bias" if internvl else "qkv_bias", not internvl),
            qk_norm=bool(own.get("use_qk_norm", False)) if internvl else False,
            final_norm=not own.get("use_mean_pooling", True) if internvl else True,
            initializer_range=float(own.get("initializer_range", 0.02)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model; labels are named ``LABEL_0`` and on.

        Returns:
            A new dict of JSON values.
        """
        vit = not self.model_type.startswith("siglip")
        own: dict[str, Any] = {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "image_size": _one(self.image_size),
            "patch_size": _one(self.patch_size),
            "num_channels": self.num_channels,
            "hidden_act": self.hidden_act,
            "layer_norm_eps": self.layer_norm_eps,
        }
        own |= {"initializer_range": self.initializer_range} if vit else {}
        match self.model_type:
            case "vit":
                own["qkv_bias"] = self.qkv_bias
            case "internvl_vision":
                own["attention_bias"], own["use_qk_norm"] = self.qkv_bias, self.qk_norm
                own["norm_type"], own["use_mean_pooling"] = self.norm_type, not self.final_norm
            case _:
                own["vision_use_head"] = self.pooler
        if self.model_type == "siglip":
            own = {"vision_config": own | {"model_type": "siglip_vision_model"}}
        hf = {"architectures": [self.class_name], "model_type": self.model_type, **own}
        if self.num_labels is not None:
            names = [f"LABEL_{label}" for label in range(self.num_labels)]
            hf["id2label"] = {str(label): name for label, name in enumerate(names)}
            hf["label2id"] = {name: label for label, name in enumerate(names)}
        return hf


def pair(size: Any) -> tuple[int, int]:
    """Height and width, said as one number or as two.

    Example:
        >>> from emloc_jax.models.vision_config import pair
        >>> pair(224), pair([32, 16])
        ((224, 224), (32, 16))
    """
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _one(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _type_of(architectures: Any) -> str | None:
    for model_type, classes in VISION_CLASSES.items():
        if set(architectures or ()) & set(classes):
            return model_type
    return None
