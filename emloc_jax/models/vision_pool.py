"""SigLIP's pooling head: one learned query attends over the patches."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from emloc_jax.models.attend import attend
from emloc_jax.models.plain_layers import PlainMlp, new_dense, new_norm
from emloc_jax.models.vision_config import VisionConfig

__all__ = ["AttentionPool"]


class AttentionPool(nn.Module):
    """``y + mlp(norm(y))`` with ``y`` the attention of one learned query over all patches.

    Queries, keys and values are one kernel, as torch stores them (Zhai et al. 2023, arXiv
    2303.15343).

    Attributes:
        config: the encoder's shape.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the parts."""
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(c.initializer_range)
        self.probe = self.param("probe", normal, (c.hidden_size,), self.param_dtype)
        self.projections = new_dense(c, 3 * c.hidden_size, dtypes)
        self.output = new_dense(c, c.hidden_size, dtypes)
        self.norm = new_norm(c, dtypes)
        self.mlp = PlainMlp(c, inner="intermediate", outer="output", **dtypes)

    def __call__(self, hidden: Array) -> Array:
        """(B, N, D) to (B, D)."""
        c = self.config
        probe = jnp.broadcast_to(self.probe, (len(hidden), 1, c.hidden_size)).astype(hidden.dtype)
        # One call for all of them keeps the kernel in one piece; the extra row costs nothing.
        mixed = self.projections(jnp.concatenate([probe, hidden], axis=1))
        queries, keys, values = jnp.split(
            mixed.reshape(len(hidden), -1, 3 * c.num_heads, c.head_dim), 3, axis=2
        )
        seen = attend(queries[:, :1], keys[:, 1:], values[:, 1:], None, causal=False)
        pooled = self.output(seen)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]
