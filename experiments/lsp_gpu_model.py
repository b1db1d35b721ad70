"""Shapes, random models and predictions for `lsp_gpu.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.kernels import intercept
from emloc_jax.models import Decoder, DecoderConfig, block_stack
from emloc_jax.offload import (
    BlockShape,
    DevicePutLink,
    FitOptions,
    PinnedHostLink,
    PipelineOptions,
    Workload,
)
from emloc_jax.training import make_head_loss


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the subspace that the paper trains it in."""

    layers: int
    width: int
    ffn: int
    heads: int
    vocabulary: int
    subspace: int
    nnz: int

    @property
    def kernels(self):
        """(d_in, d_out) of a block's kernels."""
        return (
            ((self.width, self.width),) * 4
            + ((self.width, self.ffn),) * 2
            + ((self.ffn, self.width),)
        )


SHAPES = {
    "1.3b": Shape(24, 2048, 5504, 16, 32256, 1280, 4),  # DeepSeek-Coder 1.3B
    "6.7b": Shape(32, 4096, 11008, 32, 32256, 2048, 8),  # DeepSeek-Coder 6.7B
    "tiny": Shape(3, 64, 96, 4, 128, 32, 4),
}


def make_model(shape, attention=None):
    config = DecoderConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.width // shape.heads,
    )
    kind = jnp.bfloat16
    return Decoder(config, dtype=kind, param_dtype=kind, attention_implementation=attention)


def random_stack(model, seed=0):
    """The model's block stack, with parameters that are drawn on the device, block by block.

    So there is never a second copy of the model, neither on the device nor on the host.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    outer = jax.jit(lambda key: draw(key, {k: v for k, v in shapes.items() if k != "layers"}))
    block = jax.jit(lambda key: draw(key, shapes["layers"]["0"]))
    stack = dataclasses.replace(
        block_stack(model, wrap=intercept),
        outer=lambda params: outer(params["key"]),
        block_params=lambda params, index: block(jax.random.fold_in(params["key"], index)),
    )
    return stack, {"key": jax.random.key(seed)}


def draw(key, shapes):
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [
        jnp.ones(leaf.shape, leaf.dtype)
        if len(leaf.shape) == 1  # of a norm
        else 0.02 * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def random_batch(shape, batch, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, shape.vocabulary, (batch, length + 1))
    tokens = tokens.astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((batch, length), np.float32),
    }


def head_loss_of(model, chunk):
    return make_head_loss(intercept(model.apply), chunk=chunk)


def options_of(task, shape):
    return PipelineOptions(
        learning_rate=1e-5,
        subspace=task["subspace"],
        nnz=shape.nnz,
        fit=FitOptions(steps=task["fit_steps"], threshold=0.3 if task["fit_steps"] > 1 else 1e9),
        refit_every=10**9,
        product=task["product"],
        wire=task["wire"],
        rounding=task["rounding"],
        host_memory=task["host_memory"],
    )


def link_named(name):
    return PinnedHostLink() if name == "pinned" else DevicePutLink()


def workload_of(shape, batch, length):
    """What the cost model is told of a run."""
    sides = sum(map(sum, shape.kernels))
    block = BlockShape(
        shape.kernels,
        frozen=2 * shape.width,
        flops=4.0 * length * shape.width,  # attention's two products, computed in full
        # Logits and probabilities of attention in fp32 and their gradients, beside the rows.
        working=sides + 6 * shape.heads * length,
    )
    outside = BlockShape((), frozen=2 * shape.vocabulary * shape.width + shape.width)
    return Workload((block,) * shape.layers, tokens=batch * length, outside=outside)
