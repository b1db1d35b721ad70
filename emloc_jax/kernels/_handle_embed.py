"""`nn.Embed`: as a lookup table, and as the head of a model with tied embeddings."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from emloc_jax.kernels._handle_dense import contract, first_argument
from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._product import KernelUse

__all__ = ["use_attend", "use_lookup"]

# The table is stored (vocabulary, width); as a kernel it maps width to vocabulary.
_LAYOUT = Layout(perm=(1, 0))


def use_attend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelUse | str:
    """Handler of `nn.Embed.attend`: `y = x @ embedding.T`."""
    m: Any = module
    x = first_argument(args, kwargs, "query")

    def full(x, embedding):
        x, embedding = m.promote_dtype(x, embedding, dtype=m.dtype)
        return jnp.dot(x, embedding.T)

    def low_rank(x, left, right):
        x, left, right = m.promote_dtype(x, left, right, dtype=m.dtype)
        narrow = contract(x, (x.ndim - 1,), left, None)
        return contract(narrow, (narrow.ndim - 1,), right, None)

    return KernelUse(
        module=module,
        param="embedding",
        inputs=x,
        layout=_LAYOUT,
        full=full,
        low_rank=low_rank,
        finish=lambda y: y,
        rows=lambda x: x,
        out_rows=lambda y: (y, lambda rows: rows),
        input_key=(x.ndim - 1,),
    )


def use_lookup(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelUse | str:
    """Handler of `nn.Embed.__call__`: columns of `right` are gathered before `left` widens them."""
    m: Any = module
    ids = first_argument(args, kwargs, "inputs")

    def full(ids, embedding):
        (embedding,) = m.promote_dtype(embedding, dtype=m.dtype, inexact=False)
        return jnp.take(embedding, ids, axis=0)

    def low_rank(ids, left, right):
        left, right = m.promote_dtype(left, right, dtype=m.dtype, inexact=False)
        narrow = jnp.take(right, ids, axis=1)  # (rank, *ids)
        return contract(narrow, (0,), left.T, None)

    return KernelUse(
        module=module,
        param="embedding",
        inputs=ids,
        layout=_LAYOUT,
        full=full,
        low_rank=low_rank,
        finish=lambda y: y,
        rows=None,
        out_rows=None,
    )
