"""The whole story on one small task: zero-shot, LoRA, emulators, correction; shared by experiments.

A `Story` runs one seed of a task with a model that was trained before, one row after the other:
`original` is the model as it is and with LoRA trained on it, every other row an emulator (a
weighting and a ratio) with LoRA trained on it, served on the original uncorrected and corrected.
Results are appended to a file one by one, and a second call goes on where the first stopped.

Gain retention = (zero-shot - method) / (zero-shot - LoRA on the original), of the test loss.
"""

import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from emloc_jax.adapters import attach, choose_limit, correct, init_adapters
from emloc_jax.emulator import calibrate, compress
from emloc_jax.kernels import flatten_leaves, intercept, set_leaves
from emloc_jax.training import (
    evaluate_loss,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    train,
)

RATIOS, WEIGHTINGS = (0.5, 0.25), ("plain", "one_sided", "two_sided")
ROWS = {f"{weighting} {ratio}": (weighting, ratio) for ratio in RATIOS for weighting in WEIGHTINGS}
LIMITS = (0.0, 0.5, 1.0, 3.0)
RANK, ALPHA = 8, 16.0


class Programs:
    """What is compiled; once for all seeds and rows whose parameters have the same ranks.

    `make_loss(apply) -> loss(params, batch) -> (sum, weight)`; `mask` as `calibrate` takes it;
    `where` are expressions of the kernels that are compressed and get adapters.
    """

    def __init__(self, model, make_loss, *, mask, where, steps, rate):
        self.model, self.mask, self.where, self.steps = model, mask, where, steps
        self.apply = intercept(model.apply)
        self.loss = make_loss(self.apply)
        schedule = make_schedule(rate, steps=steps, warmup=min(10, steps - 1))
        self.tx = make_optimizer(schedule)
        self.step = make_train_step(self.loss, self.tx, combine=lambda a, f, key: attach(f, a))


class Story:
    """One seed: `data` are a stream to train on, and lists of batches to calibrate and to test."""

    def __init__(self, programs, params, kernels, seed, data):
        self.programs, self.params, self.kernels, self.seed = programs, params, kernels, seed
        self.stream, self.calibration, self.test = data

    def measure(self, params):
        """Figures on the test batches; subclasses add theirs to the loss."""
        return {"loss": evaluate_loss(self.programs.loss, params, self.test).loss}

    def look(self, params, name):
        """Called with the parameters of every way that is served; nothing to see here."""

    def moments(self):
        return calibrate(
            lambda variables, batch: self.programs.loss(variables["params"], batch)[0],
            self.params,
            self.calibration,
            kernels=self.kernels,
            mask=self.programs.mask,
            gradients=True,
        )

    def fresh(self):
        key = jax.random.key(self.seed)
        where = self.programs.where
        return init_adapters(key, self.kernels, where=where, rank=RANK, alpha=ALPHA)

    def train_lora(self, frozen):
        programs = self.programs
        state = init_state(self.fresh(), programs.tx)
        result = train(programs.step, state, self.stream, steps=programs.steps, frozen=frozen)
        return result.state.trainables, result.seconds_per_step

    def original(self):
        untouched = attach(self.params, self.fresh())
        record = {"zero_shot": self.measure(untouched)}
        self.look(untouched, "zero-shot")
        adapters, record["step_seconds"] = self.train_lora(self.params)
        tuned = attach(self.params, adapters)
        record["lora"] = self.measure(tuned)
        self.look(tuned, "LoRA on the original")
        return record

    def emulated(self, name, moments):
        weighting, ratio = ROWS[name]
        began = time.perf_counter()
        emulator, _ = compress(
            self.params,
            None if weighting == "plain" else moments,
            kernels=self.kernels,
            weighting=weighting,
            ratios=[(rule, ratio) for rule in self.programs.where],
        )
        jax.block_until_ready(emulator)
        record = {"build_seconds": time.perf_counter() - began}
        record["untrained"] = self.measure(attach(emulator, self.fresh()))
        adapters, record["step_seconds"] = self.train_lora(emulator)
        record["emulator"] = self.measure(attach(emulator, adapters))
        self.look(attach(emulator, adapters), f"{name}, emulator")
        limit, on_calibration = choose_limit(
            adapters,
            self.params,
            emulator,
            self.programs.loss,
            self.calibration,
            candidates=LIMITS,
        )
        record |= {"auto_limit": limit, "on_calibration": on_calibration, "by_limit": {}}
        for bound in LIMITS:
            served = attach(self.params, correct(adapters, self.params, emulator, limit=bound))
            record["by_limit"][str(bound)] = self.measure(served)
            for way, own in (("uncorrected", 0.0), ("corrected", limit)):
                if own == bound:
                    self.look(served, f"{name}, {way}")
        return record


def run_rows(file, seeds, rows, make_story, after=None):
    """Runs what is missing in `file`: for every seed the original, then the rows."""
    for seed in seeds:
        done = {record["row"] for record in read(file) if record["seed"] == seed}
        todo = [row for row in ("original", *rows) if row not in done]
        if not todo:
            continue
        story, moments = make_story(seed), None
        for row in todo:
            began = time.perf_counter()
            if row == "original":
                record = story.original()
            else:
                moments = story.moments() if moments is None else moments
                record = story.emulated(row, moments)
            record["seconds"] = time.perf_counter() - began
            write(file, {"seed": seed, "row": row} | record)
        if after is not None:
            after(seed)


def pretrained(file, init, fit):
    """Parameters from their file; or `fit(init())`, which is kept there."""
    if file.is_file():
        tree = jax.eval_shape(init)
        with np.load(file) as stored:
            return set_leaves(tree, {path: jax.numpy.asarray(stored[path]) for path in stored})
    began = time.perf_counter()
    params = fit(jax.jit(init)())
    print(f"pre-trained in {time.perf_counter() - began:.0f} s", flush=True)
    np.savez(file, **{path: np.asarray(leaf) for path, leaf in flatten_leaves(params).items()})
    return params


def print_some(record, every=50):
    """A callback of `train`: the loss of every fiftieth step."""
    if record["step"] % every == 0:
        print(json.dumps({key: record[key] for key in ("step", "loss")}), flush=True)


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, record):
    print(json.dumps(record), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


COLUMNS = {
    "emulator, untrained": lambda r: r["untrained"],
    "emulator alone": lambda r: r["emulator"],
    "uncorrected": lambda r: r["by_limit"]["0.0"],
    "limit 1": lambda r: r["by_limit"]["1.0"],
    "limit 3": lambda r: r["by_limit"]["3.0"],
    "corrected (auto)": lambda r: r["by_limit"][str(r["auto_limit"])],
}


def table(file, figure="loss", digits=4):
    """Markdown: means over the seeds that are there; of the loss with mean gain retention."""
    records = read(Path(file))
    originals = {r["seed"]: r for r in records if r["row"] == "original"}
    if not originals:
        return
    zero = statistics.mean(r["zero_shot"][figure] for r in originals.values())
    lora = statistics.mean(r["lora"][figure] for r in originals.values())
    print(f"\n{figure}, {len(originals)} seeds: zero-shot {zero:.{digits}f}, ", end="")
    print(f"LoRA on the original {lora:.{digits}f}\n")
    print("| emulator | seeds | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for name in ROWS:
        rows = [r for r in records if r["row"] == name and r["seed"] in originals]
        if not rows:
            continue
        cells = []
        for column, pick in COLUMNS.items():
            cell = f"{statistics.mean(pick(r)[figure] for r in rows):.{digits}f}"
            if figure == "loss" and not column.startswith("emulator"):
                kept = statistics.mean(retention(originals[r["seed"]], pick(r)) for r in rows)
                cell += f" ({kept:.2f})"
            cells.append(cell)
        print(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")


def retention(original, found):
    """Gain retention of one seed."""
    zero = original["zero_shot"]["loss"]
    return (zero - found["loss"]) / (zero - original["lora"]["loss"])
