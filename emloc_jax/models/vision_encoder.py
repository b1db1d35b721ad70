"""ViT, SigLIP's vision tower and InternViT: patches, blocks that look both ways, and a head."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.models.layer_stack import Remat, new_layers, run_layers
from emloc_jax.models.plain_layers import new_dense, new_norm
from emloc_jax.models.vision_block import VisionBlock
from emloc_jax.models.vision_config import VisionConfig
from emloc_jax.models.vision_pool import AttentionPool

__all__ = ["VisionEncoder"]


class VisionEncoder(nn.Module):
    """ViT (arXiv 2010.11929), SigLIP's vision tower (2303.15343) or InternViT (2312.14238).

    The parameter tree, with ``{i}`` from 0 to L-1 in the unrolled layout; scanned, ``layers`` has
    no ``{i}`` and every leaf below it has a leading axis L::

        embed_patches/{kernel (height, width, channels, D), bias}
        class_token (D,)                            ViT, InternViT
        embed_positions/embedding (N, D)
        layers/{i}/attention_norm/{scale, bias}
        layers/{i}/attention/{query, key, value, output}/{kernel, bias}
        layers/{i}/attention/{query_norm, key_norm}/scale      InternViT, if the config has them
        layers/{i}/mlp_norm/{scale, bias}
        layers/{i}/mlp/{intermediate, output}/{kernel, bias}
        layers/{i}/{attention_scale, mlp_scale} (D,)           InternViT
        norm/{scale, bias}                          unless the config lacks it
        pooler/...                                  a bare ViT; SigLIP, if the config has it
        classifier/{kernel (D, labels), bias}       classification

    Every projection is a plain ``nn.Dense`` and the patches are a plain ``nn.Conv``, so all of them
    are kernels. Dropout is not applied: the model is deterministic.

    Attributes:
        config: the encoder's shape, and its head.
        dtype: of the computation, fp32 or bf16. Norms, the softmax and what is returned by
            ``__call__`` are fp32 whatever it is.
        param_dtype: of fresh parameters.
        scan_layers: one compiled block, scanned, instead of L copies.
        remat: see ``CausalModel``.
        attention_implementation: see ``CausalModel``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import VisionConfig, VisionEncoder
        >>> config = VisionConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        ...                       image_size=(8, 8), patch_size=(4, 4)).with_labels(3)
        >>> model, pixels = VisionEncoder(config, scan_layers=True), jnp.zeros((2, 8, 8, 3))
        >>> params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
        >>> jax.jit(model.apply)({"params": params}, pixels).shape
        (2, 3)
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = False
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts; ``layers`` is one block if they are scanned."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(c.initializer_range)
        self.embed_patches = nn.Conv(
            c.hidden_size,
            kernel_size=c.patch_size,
            strides=c.patch_size,
            padding="VALID",
            kernel_init=normal,
            **dtypes,
        )
        if c.class_token:
            shape = (c.hidden_size,)
            self.class_token = self.param("class_token", normal, shape, self.param_dtype)
        table: dict[str, Any] = dict(features=c.hidden_size, embedding_init=normal, **dtypes)
        self.embed_positions = nn.Embed(c.num_tokens, **table)
        self.layers = new_layers(self.block, c.num_layers, self.scan_layers)
        if c.final_norm:
            self.norm = new_norm(c, dtypes)
        if c.pooler:
            vit = c.model_type == "vit"
            self.pooler = new_dense(c, c.hidden_size, dtypes) if vit else AttentionPool(c, **dtypes)
        if c.num_labels is not None:
            self.classifier = new_dense(c, c.num_labels, dtypes)

    def __call__(self, pixels: Array) -> Array:
        """What the head makes of the images.

        Args:
            pixels: (B, height, width, channels), normalised; the channels come last.

        Returns:
            fp32: classification (B, labels); bare encoder (B, N, D), the normed hidden states.
        """
        hidden = self.hidden(pixels)
        if self.is_initializing() and self.config.pooler:
            self.pool(hidden)  # nothing here calls it, but it has parameters
        return self.logits(hidden)

    def hidden(self, pixels: Array) -> Array:
        """The residual stream after the final norm, (B, N, D) in ``dtype``; ``method='hidden'``.

        Args:
            pixels: see ``__call__``.

        Returns:
            (B, N, D) in ``dtype``; a class token comes first.
        """
        x = run_layers(
            self.layers,
            lambda block, x, _: block(x, None),
            self.embed(pixels),
            num_layers=self.config.num_layers,
            scan=self.scan_layers,
            remat=self.remat,
        )
        return self.final(x)

    def embed(self, pixels: Array) -> Array:
        """The residual stream before the first block; ``method='embed'``.

        Args:
            pixels: see ``__call__``.

        Returns:
            (B, N, D) in ``dtype``.

        Raises:
            DataError: the images have another size than the model.
        """
        c = self.config
        if pixels.shape[1:] != (*c.image_size, c.num_channels):
            raise DataError(
                f"Images of shape {tuple(pixels.shape)} were given; the model takes "
                f"(batch, {c.image_size[0]}, {c.image_size[1]}, {c.num_channels}), channels last. "
                "Resize them with the model's own ImageProcessor."
            )
        x = self.embed_patches(pixels.astype(self.dtype))
        x = x.reshape(len(x), -1, c.hidden_size)
        if c.class_token:
            first = jnp.broadcast_to(self.class_token, (len(x), 1, c.hidden_size))
            x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        return x + self.embed_positions(jnp.arange(c.num_tokens))

    def final(self, x: Array) -> Array:
        """The norm behind the last block, if there is one; ``method='final'``."""
        return self.norm(x) if self.config.final_norm else x

    def pool(self, hidden: Array) -> Array:
        """One vector of each image; ``method='pool'``.

        Args:
            hidden: (B, N, D), from ``hidden``.

        Returns:
            (B, D) in ``dtype``: ViT's ``tanh(pooler(x))`` of the class token, or SigLIP's
            attention over the patches.

        Raises:
            ConfigError: the model has no pooler.
        """
        if not self.config.pooler:
            raise ConfigError(
                "The pooled vector of an image encoder without a pooler was asked for (its head "
                f"is {self.config.head!r}). Take hidden states with method='hidden'."
            )
        if self.config.model_type == "vit":
            return jnp.tanh(self.pooler(hidden[:, 0]))
        return self.pooler(hidden)

    def head(self, x: Array) -> Array:
        """Final norm and head on the residual stream after the last block; ``method='head'``."""
        return self.logits(self.final(x))

    def logits(self, hidden: Array) -> Array:
        """The head; ``method='logits'``.

        A ViT classifier reads the class token, a SigLIP classifier the mean of all patches.

        Args:
            hidden: (B, N, D), from ``hidden``.

        Returns:
            fp32; see ``__call__``.
        """
        if self.config.head == "classification":
            read = hidden[:, 0] if self.config.class_token else jnp.mean(hidden, axis=1)
            hidden = self.classifier(read)
        return hidden.astype(jnp.float32)

    @nn.nowrap
    def block(self, name: str | None = None) -> VisionBlock:
        """A new ``VisionBlock`` of this model."""
        return VisionBlock(
            self.config, self.dtype, self.param_dtype, self.attention_implementation, name=name
        )

    @nn.nowrap
    def context(self, pixels: Array) -> None:
        """What every block reads besides the residual stream: nothing."""
        return None
