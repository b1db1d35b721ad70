"""Memory and time of a training step on the emulator against LoRA and inference on the original.

    python experiments/step_cost.py                      # Llama-shaped, where products dominate
    python experiments/step_cost.py --shape smollm2

Takes about five minutes on two CPU cores. Expect, at ratio 0.5: peak memory of the emulator's step
at most 1.00 of the original's inference peak, time at most 0.75 of the LoRA step on the original.
Memory is XLA's compiled analysis (arguments + outputs + temporaries - donated); time is the median
of interleaved steps in one process. Weights are random: neither figure depends on them.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import attach, init_adapters
from emloc_jax.kernels import LowRankKernel, find_kernels, intercept, set_leaves
from emloc_jax.models import Decoder, DecoderConfig
from emloc_jax.training import init_state, make_loss, make_optimizer, make_train_step

SHAPES = {
    # Width, layers and vocabulary such that blocks hold most parameters, as in models of 7B and up.
    "llama": DecoderConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=12,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
    ),
    "smollm2": DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tie_embeddings=True,
    ),
}


def make_batch(batch_size, length, vocabulary):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch_size, length + 1))
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "weights": np.ones((batch_size, length), np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
        "segments": np.ones((batch_size, length), np.int32),
    }


def emulate(params, kernels, ratio):
    """Factors of the right shapes; random, since neither time nor memory depends on them."""
    leaves = {}
    for i, (path, spec) in enumerate(kernels.items()):
        rank = int(spec.d_in * spec.d_out * ratio / (spec.d_in + spec.d_out))
        keys = jax.random.split(jax.random.key(i))
        left = jax.random.normal(keys[0], (*spec.stack_shape, *spec.in_shape, rank), spec.dtype)
        right = jax.random.normal(keys[1], (*spec.stack_shape, rank, *spec.out_shape), spec.dtype)
        scale = (spec.d_in * rank) ** -0.25
        leaves[path] = LowRankKernel(left * scale, right * scale, spec.layout)
    return set_leaves(params, leaves)


def peak(compiled):
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()

    config, dtype = SHAPES[args.shape], jnp.dtype(args.dtype)
    model = Decoder(config, dtype=dtype, param_dtype=dtype, scan_layers=True, remat=True)
    batch = make_batch(args.batch_size, args.length, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"])["params"]
    found = find_kernels(model.apply, params, batch["tokens"])
    kernels = {path: spec for path, spec in found.items() if path.startswith("layers/")}
    apply = intercept(model.apply)
    loss, tx = make_loss(apply, chunk=64), make_optimizer(1e-4)

    def inference(params, tokens):
        hidden = apply({"params": params}, tokens, method="hidden")
        return apply({"params": params}, hidden[:, -1], method="logits")

    compiled = jax.jit(inference).lower(params, batch["tokens"]).compile()
    reference = peak(compiled)
    report = {"device": jax.devices()[0].device_kind, **vars(args), "inference_bytes": reference}

    trees = {"lora": params, "emulator 0.5": None, "emulator 0.25": None}
    steps, states, times = {}, {}, {}
    for name in trees:
        if trees[name] is None:
            trees[name] = emulate(params, kernels, float(name.split()[1]))
        adapters = init_adapters(jax.random.key(1), kernels, where=".*", rank=8, alpha=16)
        states[name] = init_state(adapters, tx)
        step = make_train_step(loss, tx, combine=lambda a, frozen, key: attach(frozen, a))
        steps[name] = step.lower(states[name], trees[name], batch).compile()
        report[f"{name}: memory / inference"] = round(peak(steps[name]) / reference, 3)
        times[name] = []
    for _ in range(args.repeats + 1):
        for name in trees:
            began = time.perf_counter()
            states[name], metrics = steps[name](states[name], trees[name], batch)
            jax.block_until_ready((states[name].trainables, metrics))
            times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name in trees:
        report[f"{name}: seconds"] = round(seconds[name], 3)
        report[f"{name}: time / lora"] = round(seconds[name] / seconds["lora"], 3)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
