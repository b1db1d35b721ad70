"""LSP-Offload on one GPU: bandwidths, products, step times, peak memory, and runs under a cap.

    python experiments/lsp_gpu.py --output lsp_gpu.jsonl               # all, 9 minutes at a time
    python experiments/lsp_gpu.py --output lsp_gpu.jsonl --parts step --shapes 6.7b --schedules lsp
    python experiments/lsp_gpu.py --output lsp_gpu.jsonl --table       # tables of what is there
    JAX_PLATFORMS=cpu python experiments/lsp_gpu.py --output tiny.jsonl --shapes tiny  # anywhere

Each run is a process of its own, so that peaks do not mix, and appends to `--output` as it goes.
What is there already is not run again: repeat the command until it says that nothing is left.

Parts. `hardware`: figures for the cost model. `bandwidth`: every way over the link at several
sizes, alone, both ways at once and beside a matrix product. `products`: sparse against dense
products of the projectors. `step`: every schedule on random weights of DeepSeek-Coder 1.3B and
6.7B, 1024 tokens by 4 rows. `cap`: LSP with 4 GB for 1.3B (384 tokens by 1 row, as on the laptop
of the paper, arXiv 2406.10181) and 24 GB for 6.7B, enforced by the limit of JAX's allocator.
`programs`: memory of each compiled program, which needs neither a GPU nor weights.

On a machine that shows less memory than it may use, give `--host-memory 120e9`. A run that ends
for want of memory is a result, and recorded as one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lsp_gpu_tables import tables

PARTS = ("hardware", "bandwidth", "products", "step", "cap", "programs")
SCHEDULES = ("lsp", "native", "offload", "layerwise", "lsp_serial")
SUBSPACE = {"1.3b": 1280, "6.7b": 2048, "tiny": 32}
# Bytes, batch and length under the cap.
CAPS = {"1.3b": (4e9, 1, 384), "6.7b": (24e9, 4, 1024), "tiny": (4e8, 2, 16)}
FRACTION = 0.5  # of the card, for the process that asks how much there is


def tasks_of(args, known):
    """What is to be run, the most telling first."""
    tiny = args.shapes == ["tiny"]
    common = {
        name: getattr(args, name)
        for name in ("link", "wire", "rounding", "product", "attention", "chunk", "host_memory")
    }
    limits = {"most_steps": args.steps, "most_seconds": args.seconds}
    for part in args.parts:
        if part == "hardware":
            size, width = (1 << 20, 128) if tiny else (1 << 26, 8192)
            yield {"part": part, "link": args.link, "fraction": FRACTION} | {
                "bytes": size, "width": width,
            }  # fmt: skip
        elif part == "bandwidth":
            sizes = (1 << 16, 1 << 18, 1 << 20) if tiny else (4 << 20, 16 << 20, 64 << 20)
            total, width, seconds = (1 << 22, 256, 0.1) if tiny else (1 << 30, 4096, 1.0)
            yield {"part": part, "sizes": sizes, "bytes": total, "width": width} | {
                "product_seconds": seconds
            }
        for shape in args.shapes:
            full = SUBSPACE[shape]
            rows, length = args.batch or (2 if tiny else 4), args.length or (16 if tiny else 1024)
            own = common | {"part": part, "shape": shape, "subspace": full, "fit_steps": 1}
            own |= {"batch": rows, "length": length}
            if part == "products":
                yield own
            elif part == "step":
                own |= limits | {"figures": known["figures"]}
                for schedule in args.schedules:
                    yield own | {"schedule": schedule}
                    if schedule == "lsp":
                        yield own | {"schedule": schedule, "subspace": full // 2}
            elif part == "cap":
                cap, rows, length = CAPS[shape]
                own |= {"batch": args.batch or rows, "length": args.length or length}
                yield own | {
                    "schedule": "lsp",
                    "cap": args.cap or cap,
                    "total": known["total"],
                    "fit_steps": 3,
                    "figures": known["figures"],
                    **limits,
                }
            elif part == "programs":
                for schedule, size in (("lsp", full), ("lsp", full // 2), ("native", full)):
                    yield own | {"schedule": schedule, "subspace": size}


def environment(task, args):
    own = dict(os.environ, JAX_COMPILATION_CACHE_DIR=args.cache)
    root = str(Path(__file__).resolve().parents[1])  # so that nothing has to be installed
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (root, own.get("PYTHONPATH"))))
    platforms = own.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms:
        own["JAX_PLATFORMS"] = f"{platforms},cpu"  # Adam runs there
    if task["part"] == "hardware":
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(FRACTION)
    elif task["part"] == "cap" and task["total"] is not None:
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
        own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{min(task['cap'] / task['total'], 0.95):.6f}"
    return own


def run(task, args, limit):
    """Runs a task in a process; records it if the process did not."""
    program = Path(__file__).with_name("lsp_gpu_runs.py")
    task = task | {"results": str(args.output)}
    with tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                [sys.executable, str(program), json.dumps(task)],
                env=environment(task, args),
                stderr=errors,
                timeout=limit,
            )
            outcome = None if done.returncode == 0 else f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if args.verbose:
        print(said)
    if outcome is not None:
        names = {key: value for key, value in task.items() if key not in ("figures", "results")}
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(names | {"outcome": outcome, "message": said[-1500:]}) + "\n")


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_done(task, records):
    names = {key: value for key, value in task.items() if key not in ("figures", "total")}
    names = json.loads(json.dumps(names))
    return any(
        record.get("done") and all(record.get(key) == names[key] for key in names)
        for record in records
    )


def facts(records):
    """What the `hardware` part found, for the parts after it."""
    found = [r for r in records if r["part"] == "hardware" and "figures" in r]
    last = found[-1] if found else {"figures": None, "memory_total": None}
    return {"figures": last["figures"], "total": last["memory_total"]}


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="file of results, one JSON object per line")
    add("--table", action="store_true", help="print what is in the file, and run nothing")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    add("--shapes", nargs="+", default=["1.3b", "6.7b"], choices=list(SUBSPACE))
    add("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    add("--batch", type=int, help="rows; 4, and 1 for 1.3b under the cap")
    add("--length", type=int, help="tokens of a row; 1024, and 384 for 1.3b under the cap")
    add("--cap", type=float, help="bytes, in place of 4e9 for 1.3b and 24e9 for 6.7b")
    add("--link", default="pinned", choices=["pinned", "device_put"])
    add("--wire", default="bfloat16", choices=["bfloat16", "float32"])
    add("--product", default="sparse", choices=["sparse", "dense", "auto"])
    add("--rounding", default="stochastic", choices=["nearest", "stochastic", "kahan", "master"])
    add("--attention", choices=["xla", "cudnn"], help="of jax.nn.dot_product_attention")
    add("--chunk", type=int, default=256, help="tokens whose logits live at once")
    add("--host-memory", type=lambda text: int(float(text)), help="bytes Adam may take there")
    add("--steps", type=int, default=8, help="most measured steps of a run, at least 3")
    add("--seconds", type=float, default=40.0, help="after which no further step begins")
    add("--minutes", type=float, default=9.0, help="for all runs of this command")
    add("--limit", type=float, default=300.0, help="seconds for one run")
    add("--cache", default=str(Path(tempfile.gettempdir()) / "emloc_jax_compiled"))
    add("--verbose", action="store_true", help="print what the runs say")
    return parser.parse_args()


def main():
    args = options()
    ends = time.monotonic() + 60 * args.minutes
    left = 0
    # Every part after the first wants to know what the first has found.
    for part in [] if args.table else args.parts:
        args.parts = [part]
        for task in tasks_of(args, facts(read(args.output))):
            seen = read(args.output)
            if is_done(task, seen):
                continue
            remaining = ends - time.monotonic()
            if remaining < min(20 if args.shapes == ["tiny"] else 120, args.limit):
                left += 1  # it would be cut off
                continue
            name = " ".join(str(task[key]) for key in ("part", "shape", "schedule") if key in task)
            began = time.monotonic()
            run(task, args, min(args.limit, remaining))
            new = read(args.output)[len(seen) :]
            outcomes = sorted({record["outcome"] for record in new})
            print(f"{name}: {', '.join(outcomes)}, {time.monotonic() - began:.0f} s", flush=True)
            left += not is_done(task, read(args.output))
    print(tables(read(args.output)))
    if left:
        print(f"\n{left} runs are left; give the same command again.")
    elif not args.table:
        print("\nNothing is left to run.")


if __name__ == "__main__":
    main()
