"""Records, table and figure of lsp_quality.py."""

import json
import statistics

import numpy as np

ORDER = ("e2e", "gsm8k", "banking77")
NAMES = {"full": "full Adam", "lsp": "LSP", "galore": "GaLore", "lora": "LoRA"}


def value(scores):
    """Smaller is better."""
    loss = scores["loss"]
    if not np.isfinite(loss):
        return float("inf")
    return -scores["accuracy"] if "accuracy" in scores else loss


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
    return [r for r in mine if r["rate"] == best and r["test"]]


def at_time(record, key, seconds):
    """The last evaluation within so many seconds; None before the first."""
    spent = np.cumsum(record["seconds"])
    within = [int(step) for step in record["test"] if spent[int(step) - 1] <= seconds]
    return record["test"][str(max(within))][key] if within else None


def table(path):
    records = read(path)
    for task in ORDER:
        rows = {method: chosen(records, task, method) for method in NAMES}
        rows = {method: runs for method, runs in rows.items() if runs}
        if not rows:
            continue
        key = "accuracy" if task == "banking77" else "loss"
        start = [r for r in records if (r["task"], r["method"]) == (task, "none")]
        steps = len(next(iter(rows.values()))[0]["train"])
        print(f"\n**{task}**, test {key}, {steps} steps; ", end="")
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
    tasks = [task for task in ORDER if any(r["task"] == task for r in records)]
    grid, axes = plt.subplots(len(tasks), 2, figsize=(9, 3 * len(tasks)), squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=True):
        key = "accuracy" if task == "banking77" else "loss"
        zero = next(r for r in records if (r["task"], r["method"]) == (task, "none"))["test"][key]
        for color, method in enumerate(NAMES):
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
