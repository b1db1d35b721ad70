"""The FLUX transformer: what a latent image flows towards, given a prompt and a time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.errors import ConfigError
from emloc_jax.models.flux_blocks import DoubleBlock, SingleBlock
from emloc_jax.models.flux_config import FluxConfig
from emloc_jax.models.flux_layers import (
    FluxContext,
    Modulation,
    TwoLayerMlp,
    norm,
    timestep_waves,
)
from emloc_jax.models.flux_rope import axis_rope_tables
from emloc_jax.models.layer_stack import Remat, new_layers, run_layers

__all__ = ["Flux"]


class Conditions(nn.Module):
    """Embeds timestep, guidance and pooled prompt, and adds them up.

    Attributes:
        config: the model's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    config: FluxConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the embedders."""
        options: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        options["features"] = self.config.hidden_size
        self.timestep_embedder = TwoLayerMlp(**options)
        if self.config.guidance_embeds:
            self.guidance_embedder = TwoLayerMlp(**options)
        self.text_embedder = TwoLayerMlp(**options)

    def __call__(self, timesteps: Array, guidance: Array | None, pooled: Array) -> Array:
        """(B,), (B,) and (B, P) to (B, D)."""
        summed = self.timestep_embedder(timestep_waves(1000 * timesteps).astype(self.dtype))
        if guidance is not None:
            waves = timestep_waves(1000 * guidance).astype(self.dtype)
            summed += self.guidance_embedder(waves)
        return summed + self.text_embedder(pooled.astype(self.dtype))


class Flux(nn.Module):
    """FLUX.1 (Black Forest Labs 2024), as ``diffusers.FluxTransformer2DModel`` computes it.

    The parameter tree, with ``{i}`` from 0 in the unrolled layout; scanned, both kinds of layers
    have no ``{i}`` and every leaf below them has a leading axis::

        x_embedder/{kernel (C, D), bias}
        context_embedder/{kernel (E, D), bias}
        time_text_embed/{timestep,guidance,text}_embedder/linear_{1, 2}/{kernel, bias}
        double_layers/{i}/{norm1, norm1_context}/linear/{kernel (D, 6 D), bias}
        double_layers/{i}/attn/{to_q, to_k, to_v, to_out}/{kernel, bias}
        double_layers/{i}/attn/{add_q_proj, add_k_proj, add_v_proj, to_add_out}/{kernel, bias}
        double_layers/{i}/attn/{norm_q, norm_k, norm_added_q, norm_added_k}/scale
        double_layers/{i}/{ff, ff_context}/{inner, outer}/{kernel, bias}
        single_layers/{i}/norm/linear/{kernel (D, 3 D), bias}
        single_layers/{i}/attn/{to_q, to_k, to_v}/{kernel, bias}
        single_layers/{i}/attn/{norm_q, norm_k}/scale
        single_layers/{i}/{proj_mlp (D, 4 D), proj_out (5 D, D)}/{kernel, bias}
        norm_out/linear/{kernel (D, 2 D), bias}
        proj_out/{kernel (D, out_channels), bias}

    Every projection is a plain ``nn.Dense``. Text encoders and the autoencoder are not part of it:
    it reads their outputs.

    Attributes:
        config: the model's shape.
        dtype: of the computation, fp32 or bf16. Norms, rotations, the softmax and what is returned
            are fp32 whatever it is.
        param_dtype: of fresh parameters.
        scan_layers: one compiled block of each kind, scanned, instead of one per layer.
        remat: see ``CausalModel``.
        attention_implementation: see ``CausalModel``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from emloc_jax.models import Flux, FluxConfig, grid_ids
        >>> config = FluxConfig(in_channels=4, out_channels=4, num_layers=1, num_single_layers=2,
        ...                     head_dim=8, num_heads=2, prompt_dim=6, pooled_dim=5,
        ...                     axes_dims=(2, 2, 4))
        >>> model = Flux(config, scan_layers=True)
        >>> inputs = (jnp.zeros((1, 6, 4)), jnp.zeros(1), jnp.zeros((1, 3, 6)), jnp.zeros((1, 5)),
        ...           grid_ids(2, 3))
        >>> params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
        >>> jax.jit(model.apply)({"params": params}, *inputs).shape
        (1, 6, 4)
    """

    config: FluxConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = False
    attention_implementation: str | None = None

    def setup(self):
        """Declares the parts; each kind of layers is one block if they are scanned."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.x_embedder = nn.Dense(c.hidden_size, **dtypes)
        self.context_embedder = nn.Dense(c.hidden_size, **dtypes)
        self.time_text_embed = Conditions(c, **dtypes)
        self.double_layers = new_layers(self.double_block, c.num_layers, self.scan_layers)
        self.single_layers = new_layers(self.single_block, c.num_single_layers, self.scan_layers)
        self.norm_out = Modulation(2, c.hidden_size, **dtypes)
        self.proj_out = nn.Dense(c.out_channels, kernel_init=nn.initializers.zeros, **dtypes)

    @nn.nowrap
    def double_block(self, **names: Any) -> DoubleBlock:
        """One double-stream block, by itself."""
        return DoubleBlock(
            self.config, self.dtype, self.param_dtype, self.attention_implementation, **names
        )

    @nn.nowrap
    def single_block(self, **names: Any) -> SingleBlock:
        """One single-stream block, by itself."""
        return SingleBlock(
            self.config, self.dtype, self.param_dtype, self.attention_implementation, **names
        )

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        prompt_embeds: Array,
        pooled_prompt_embeds: Array,
        image_ids: Array,
        text_ids: Array | None = None,
        guidance: Array | None = None,
    ) -> Array:
        """The velocity at which each latent moves, ``noise - image``.

        Args:
            latents: (B, T, C), packed.
            timesteps: (B,), 0 for a clean image and 1 for pure noise.
            prompt_embeds: (B, S, E).
            pooled_prompt_embeds: (B, P).
            image_ids: (T, axes) or (B, T, axes), from ``grid_ids``.
            text_ids: (S, axes) or (B, S, axes); None: zeros, as FLUX.1 has them.
            guidance: (B,), the guidance scale, for a model with ``guidance_embeds``.

        Returns:
            (B, T, out_channels) fp32.

        Raises:
            ConfigError: the model needs a guidance scale and none is given, or the reverse.
        """
        c = self.config
        if (guidance is not None) != c.guidance_embeds:
            said = "needs" if c.guidance_embeds else "has no use for"
            raise ConfigError(
                f"This FLUX {said} a guidance scale (guidance_embeds={c.guidance_embeds}), but "
                f"guidance is {'missing' if guidance is None else 'given'}."
            )
        conditions = self.time_text_embed(timesteps, guidance, pooled_prompt_embeds)
        cos, sin = self._tables(image_ids, text_ids, prompt_embeds.shape[1])
        # One silu for all blocks, so that their modulations are seen to read the same input.
        context = FluxContext(nn.silu(conditions), cos, sin)
        text = self.context_embedder(prompt_embeds.astype(self.dtype))
        image = self.x_embedder(latents.astype(self.dtype))
        text, image = self._run("double_layers", (text, image), context)
        x = self._run("single_layers", jnp.concatenate((text, image), axis=1), context)
        scale, shift = self.norm_out(context.conditioning)
        image = norm(x[:, text.shape[1] :]) * (1 + scale) + shift
        return self.proj_out(image).astype(jnp.float32)

    def _run(self, name: str, carry: Any, context: FluxContext) -> Any:
        return run_layers(
            getattr(self, name),
            lambda block, x, _: block(x, context),
            carry,
            num_layers=self.config.layer_depths[name],
            scan=self.scan_layers,
            remat=self.remat,
        )

    def _tables(self, image_ids: Array, text_ids: Array | None, length: int) -> tuple[Array, Array]:
        """Rotary tables of text and image tokens in a row."""
        image_ids = jnp.asarray(image_ids)
        if text_ids is None:
            text_ids = jnp.zeros((length, image_ids.shape[-1]), image_ids.dtype)
        if text_ids.ndim != image_ids.ndim:
            batch = image_ids.shape[0] if image_ids.ndim == 3 else text_ids.shape[0]
            text_ids, image_ids = (
                jnp.broadcast_to(ids, (batch, *ids.shape[-2:])) for ids in (text_ids, image_ids)
            )
        ids = jnp.concatenate((text_ids, image_ids), axis=-2)
        return axis_rope_tables(ids, self.config.axes_dims)
