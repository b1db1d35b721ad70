"""LSP-Offload: all parameters on the device, one block's gradients at work, moments on the host."""

from collections.abc import Iterator

import jax

from emloc_jax.kernels import find_kernels, intercept
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._depends import depends_on
from emloc_jax.memory._setting import Setting
from emloc_jax.memory._stage import Program, Stage, tree_bytes
from emloc_jax.memory._target import Target
from emloc_jax.models import block_stack
from emloc_jax.offload import (
    BlockShape,
    PipelineOptions,
    program_memory,
    projector_bytes,
)
from emloc_jax.offload import Setting as Projection
from emloc_jax.training import make_head_loss

__all__ = ["lsp_training"]

_MOMENTS = 8  # bytes of mu and nu
_WIRE = 4  # bytes of a number on the link, by default


@depends_on("batch_size", "length", "accumulation", "chunk", "subspace", "nnz")
def lsp_training(abstract: AbstractModel, setting: Setting, target: Target) -> Iterator[Stage]:
    """A step of the pipelined trainer with its defaults: kernels of the blocks in subspaces.

    What is on its way between device and host depends on the speed of both. Counted is the most
    there can be: one compressed gradient or update of every block. (`emloc plan method=lsp`
    simulates the lanes of a machine whose figures are known.)
    """
    subspace = int(setting.subspace) if setting.subspace > 1 else float(setting.subspace)
    batch = setting.batch(setting.micro_batch)
    with target.compiling():
        stack = block_stack(abstract.model, wrap=intercept)
        head_loss = make_head_loss(intercept(abstract.model.apply), chunk=setting.chunk)
        programs = program_memory(
            stack,
            abstract.params,
            head_loss,
            batch,
            options=PipelineOptions(subspace=subspace, nnz=setting.nnz),
            device=target.device,
        )
    outer = jax.eval_shape(stack.outer, abstract.params)
    block = jax.eval_shape(lambda tree: stack.block_params(tree, 0), abstract.params)
    x, context = jax.eval_shape(stack.embed, outer, batch["tokens"])
    kernels = find_kernels(lambda v, *given: stack.block(v["params"], *given), block, x, context)
    shape = BlockShape(tuple((spec.d_in, spec.d_out) for spec in kernels.values()))
    projection = Projection(subspace, setting.nnz)
    pairs = sum(
        projector_bytes(d, s, projection)
        for kernel, core in zip(shape.kernels, shape.cores(projection), strict=True)
        for d, s in zip(kernel, core, strict=True)
    )
    blocks, sent = stack.num_blocks, shape.sent(projection)
    waiting = blocks * sent * _WIRE
    # Every argument is among what is resident, but for the cotangent that a backward pass is given.
    cotangent = tree_bytes(x)
    yield Stage(
        "train",
        "lsp",
        {
            name: Program(memory, {"cotangent": cotangent}, memory.arguments - cotangent)
            for name, memory in programs.items()
        },
        resident={
            "parameters": tree_bytes(abstract.params),
            "projectors": blocks * pairs,
            "activations": (blocks + 1) * tree_bytes(x),
            "sums of micro-batches": waiting if setting.accumulation > 1 else 0,
            "in flight, at most": waiting,
            "batch": tree_bytes(batch) + tree_bytes(context),
        },
        host={
            "moments": blocks * sent * _MOMENTS,
            "in flight, at most": 2 * waiting,
        },
    )
