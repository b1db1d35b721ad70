"""Training under a cap on one GPU: an emulator where LoRA on the original does not fit.

    python experiments/memory_gpu.py --output memory_gpu.jsonl           # all; call again to go on
    python experiments/memory_gpu.py --output memory_gpu.jsonl --table
    JAX_PLATFORMS=cpu python experiments/memory_gpu.py --output tiny.jsonl --models smollm2-135m

Random weights in bf16 are made on the device from `configs/shapes`; a step is that of `emloc
finetune`, or of the diffusion guide for FLUX: of 1 x 1024 tokens, of seven tiles and 256 tokens
(InternVL), or of a picture of 512 by 512 pixels and a prompt of 512 tokens (FLUX). Each run is a
process of its own, whose allocator is capped by XLA_PYTHON_CLIENT_MEM_FRACTION. First inference of
the original runs without a cap and gives its peak. Then train, each under its cap:

- emulators of the 8B, of InternVL2.5-8B and of FLUX.1-dev at ratio 0.5 within the peak of
  inference, at 0.25 within 0.60 of it;
- the 38B's emulator at the paper's ratio, 0.1, within 24 GB (its original is never there);
- LoRA on the original within those caps, which has to fail: with the fp32 state of adapters and the
  activations of a backward pass it takes more than inference.

Recorded beside each other: the planned peak of the compiled step, the allocator's peak, and the
time of a step. A run that ends for want of memory is a result and recorded as one. The 8B needs a
card of 24 GB or more, FLUX.1-dev one of 40. On a CPU nothing is capped and no allocator is read:
only times and plans.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SHAPES = Path(__file__).parent.parent / "configs" / "shapes"
PAPER_CAP = 24e9
SPARE = 0.02  # of the card, for the process that asks how much there is


def runs_of(model, ratios, paper):
    """Name: (what is trained, ratio, cap as a share of inference or in bytes)."""
    if paper:
        return {f"emulator {min(ratios):g} in 24 GB": ("emulator", min(ratios), PAPER_CAP)}
    return {
        "inference": ("inference", None, None),
        "emulator 0.5": ("emulator", 0.5, 1.0),
        "emulator 0.25": ("emulator", 0.25, 0.6),
        "lora": ("lora", None, None),
        "lora within inference": ("lora", None, 1.0),
        "lora within 0.6 of inference": ("lora", None, 0.6),
    }


def setting_of(kind, ratio):
    """The rows of a step, by what a model reads."""
    from emloc_jax.memory import Setting

    if kind.has_pictures:
        blocks = (kind.layers,)
        return Setting(
            ratio=ratio, latents=1024, length=512, where=blocks, lora_where=blocks, stream=False
        )
    if kind.has_tiles:
        everywhere = ("vision/layers/.*", "layers/.*")
        return Setting(ratio=ratio, tiles=7, length=256, where=everywhere, chunk=64, stream=False)
    return Setting(ratio=ratio, chunk=64)


def batch_of(found, setting):
    """One row: drawn words or latents, every image token before the text."""
    import numpy as np

    rng, config = np.random.default_rng(0), found.model.config
    batch = {}
    for name, leaf in found.kind.batch(setting, 1).items():
        drawn = rng.standard_normal(leaf.shape) if leaf.dtype == np.float32 else np.ones(leaf.shape)
        batch[name] = drawn.astype(leaf.dtype)
    for name in {"weights", "timesteps", "guidance"} & batch.keys():
        batch[name] = np.full(batch[name].shape, 0.5, np.float32)
    if "tokens" in batch:
        tokens = rng.integers(0, config.vocab_size - 1, batch["tokens"].shape).astype(np.int32)
        if setting.tiles:
            tokens[tokens == config.image_token_id] = 0
            tokens[:, : found.kind.image_tokens(setting)] = config.image_token_id
        places = np.arange(tokens.shape[1], dtype=np.int32)[None]
        batch |= {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": places}
    return batch


def child(model, kind, ratio, steps):
    """One run; prints a line of JSON."""
    import jax
    import jax.numpy as jnp

    from emloc_jax._compiling import loop_options
    from emloc_jax._program_memory import analysed
    from emloc_jax.adapters import attach
    from emloc_jax.kernels import intercept
    from emloc_jax.memory import abstract_adapters, abstract_emulator, abstract_model
    from emloc_jax.training import init_state, make_optimizer, make_schedule, make_train_step

    device = jax.local_devices()[0]
    found = abstract_model(SHAPES / model)
    setting = setting_of(found.kind, ratio or 0.5)
    shapes = abstract_emulator(found, setting) if kind == "emulator" else found.params
    leaves, tree = jax.tree.flatten(shapes)

    def drawn(number, leaf):
        """A leaf by itself, in its own dtype, so that nothing larger is ever there."""
        make = jax.jit(
            lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype),
        )
        return jax.block_until_ready(make(jax.random.key(number)))

    frozen = tree.unflatten([drawn(n, leaf) for n, leaf in enumerate(leaves)])
    batch = batch_of(found, setting)
    apply = intercept(found.model.apply)

    if kind == "inference":
        batch = {name: batch[name] for name in found.kind.inference_batch(setting, 1)}
        program = jax.jit(
            lambda params, batch: found.kind.inference(apply, params, batch),
            compiler_options=loop_options(),
        )
        planned = analysed(program.lower(frozen, batch)).peak
        run = lambda: program(frozen, batch)  # noqa: E731
    else:
        schedule = make_schedule(1e-3, steps=100, warmup=5)
        tx = make_optimizer(schedule)
        step = make_train_step(
            found.kind.loss(apply, setting.chunk),
            tx,
            schedule=schedule,
            combine=lambda adapters, frozen, key: attach(frozen, adapters),
        )
        adapters = jax.tree.map(
            lambda leaf: 0.01 * jnp.ones(leaf.shape, leaf.dtype), abstract_adapters(found, setting)
        )
        state = [init_state(adapters, tx)]
        planned = analysed(step.lower(state[0], frozen, batch)).peak

        def run():
            state[0], metrics = step(state[0], frozen, batch)
            return metrics

    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    statistics = device.memory_stats() or {}
    print(
        json.dumps(
            {
                "device": device.device_kind,
                "planned": planned,
                "peak": statistics.get("peak_bytes_in_use"),
                "limit": statistics.get("bytes_limit"),
                "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2],
            }
        )
    )


def launch(arguments, fraction):
    """Runs this script as a child under a cap; its record, or why there is none."""
    environment = dict(os.environ)
    if fraction is not None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.5f}"
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    call = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if "RESOURCE_EXHAUSTED" in done.stderr or "out of memory" in done.stderr.lower():
        return {"out of memory": True}
    return {"error": done.stderr[-800:]}


def card():
    """Bytes of the device, 0 where the backend does not say, asked in a process of its own."""
    code = (
        "import jax; d = jax.local_devices()[0]; s = d.memory_stats() or {}; "
        f"print(int(s.get('bytes_limit', 0) / {SPARE}))"
    )
    environment = dict(os.environ) | {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(SPARE)}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def run(args):
    known = {(r["model"], r["run"]): r for r in read(args.output)}
    total = card()
    for model in args.models:
        for name, (kind, ratio, cap) in runs_of(model, args.ratios, model == "38b").items():
            if (model, name) in known:
                continue
            inference = known.get((model, "inference"), {}).get("peak")
            if cap is not None and cap <= 1:
                if total and inference is None:
                    print(f"{model}: {name} needs the peak of inference, which did not run")
                    continue
                cap = cap * inference if total else None
            fraction = None if not total else 0.92 if cap is None else cap / total
            found = launch({"model": model, "kind": kind, "ratio": ratio, "steps": args.steps},
                           fraction)  # fmt: skip
            record = {"model": model, "run": name, "cap": cap} | found
            known[model, name] = record
            print(json.dumps(record), flush=True)
            with args.output.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(path):
    """Markdown, GiB."""
    print("| model | run | cap | planned | allocator's peak | step, s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for record in read(path):
        cells = [f"{record[k] / 2**30:.2f}" if record.get(k) else "" for k in ("cap", "planned")]
        peak = f"{record['peak'] / 2**30:.2f}" if record.get("peak") else ""
        peak = "out of memory" if record.get("out of memory") else peak
        seconds = f"{record['seconds']:.3f}" if "seconds" in record else ""
        line = [record["model"], record["run"], *cells, peak, seconds]
        print("| " + " | ".join(line) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--models", nargs="+", default=["llama-3.1-8b", "38b", "internvl2.5-8b", "flux.1-dev"]
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1], help="of the 38B")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(**json.loads(args.child))
        return
    if args.output is None:
        parser.error("--output is needed")
    if not args.table:
        run(args)
    table(args.output)


if __name__ == "__main__":
    main()
