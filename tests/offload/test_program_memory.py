"""Memory of the trainer's programs, read off shapes that no machine could hold."""

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.models import Decoder, DecoderConfig
from emloc_jax.offload import PipelineOptions, program_memory
from tests.offload.pipeline_model import head_loss, make_stack

WIDTH, FFN, ROWS, LENGTH, SUBSPACE = 64, 96, 2, 4, 16
VOCABULARY = 2**30  # an embedding of 275 GB
ONE_KERNEL = [("layers/mlp/up_proj/kernel", "subspace")]


def memory(schedule, train=ONE_KERNEL):
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
    )
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH), kind)
        for name, kind in (("tokens", np.int32), ("targets", np.int32), ("weights", np.float32))
    }
    return program_memory(
        make_stack(model),
        shapes["params"],
        head_loss(model),
        batch,
        schedule=schedule,
        options=PipelineOptions(subspace=SUBSPACE, nnz=2, train=train),
    )


def close(found, expected):
    """Up to what XLA adds: a word for each array of a tuple."""
    return 0 <= found - expected < 200


def test_the_backward_pass_returns_compressed_gradients_only():
    activations, block = 4 * ROWS * LENGTH * WIDTH, 4 * (4 * WIDTH**2 + 3 * WIDTH * FFN + 2 * WIDTH)
    found = memory("lsp")
    assert {*found} == {"embed", "head", "forward", "backward", "apply", "full_gradients", "fit"}
    assert close(found["backward"].outputs, activations + 4 * SUBSPACE**2 + 4)
    assert close(found["full_gradients"].outputs, activations + 4 * WIDTH * FFN)
    # In place: all that an update returns is what it was given, but for a token.
    assert close(found["apply"].aliased, block)
    assert close(found["apply"].outputs, block + 4)
    assert found["fit"].added > 0
    table = 4 * VOCABULARY * WIDTH
    assert close(found["embed"].arguments - table, 4 * ROWS * LENGTH)


def test_without_compression_it_returns_the_gradients_in_full():
    activations, norms = 4 * ROWS * LENGTH * WIDTH, 4 * 2 * WIDTH
    found = memory("offload", train=[*ONE_KERNEL, ("layers/.*/scale", "device")])
    assert {*found} == {"embed", "head", "forward", "backward", "apply", "update"}
    assert close(found["backward"].outputs, activations + 4 * WIDTH * FFN + norms + 4)
