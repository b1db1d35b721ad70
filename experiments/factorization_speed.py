"""Time of factoring all kernels of SmolLM2-135M against the textbook route, in one process.

Command (from the repository root):

    python experiments/factorization_speed.py

Expected time: about three minutes on two idle CPU cores. Expected numbers: the ratio of `ours` to
`textbook` is at most 0.2 for the one-sided and for the two-sided form, at errors that agree to
1.001 (the largest quotient is printed). On a busy machine threaded LAPACK calls mostly wait for
each other; `OPENBLAS_NUM_THREADS=1` and the CPU seconds are then the fair comparison.

Textbook route, jitted fp32, per kernel: `eigh` of the second moment, root by eigenvalues, explicit
inverse of the root, full thin SVD of the whitened kernel, factors with square-root-balanced
singular values (the two-sided form does the same on the output side). Ours: `factorize`.

Shapes are those of the model (30 layers; q, o 576 x 576; k, v 576 x 192; gate, up 576 x 1536; down
1536 x 576); kernels and moments are random with power-law spectra and a few large input features,
so that condition numbers are like those of the real model on GSM8K (largest over mean eigenvalue
of the moments: a few hundred for inputs, about a hundred for gradients).
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.emulator import factorize

SHAPES = {
    "q": (576, 576),
    "k": (576, 192),
    "v": (576, 192),
    "o": (576, 576),
    "gate": (576, 1536),
    "up": (576, 1536),
    "down": (1536, 576),
}
INPUTS = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}
RATIO, FLOOR, DAMPING = 0.5, 1e-7, 1e-3
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="rank")
def textbook(kernel, moment, gradient, rank):
    root, inverse = whitening(moment, FLOOR if gradient is None else DAMPING)
    white = matmul(root.mT, kernel)
    if gradient is not None:
        out_root, out_inverse = whitening(gradient, DAMPING)
        white = matmul(white, out_root)
    u, s, vt = jnp.linalg.svd(white, full_matrices=False)
    left, right = matmul(inverse.mT, u[:, :rank]), vt[:rank]
    if gradient is not None:
        right = matmul(right, out_inverse)
    balance = jnp.sqrt(s[:rank])
    return left * balance, balance[:, None] * right


def whitening(moment, floor):
    values, vectors = jnp.linalg.eigh(moment)
    values = jnp.maximum(values, floor * jnp.trace(moment) / moment.shape[0])
    root = vectors * jnp.sqrt(values)
    return root, jnp.linalg.inv(root)


def make_layer(key):
    """Kernels and inputs of one layer; gradients as rows, too."""
    keys = iter(jax.random.split(key, 64))

    def rows(size, large, tokens=2048):
        decay = jnp.arange(1, size + 1) ** -0.5
        basis = jnp.linalg.qr(jax.random.normal(next(keys), (size, size)))[0]
        scale = jnp.where(jax.random.uniform(next(keys), (size,)) < 0.01, large, 1.0)
        return jax.random.normal(next(keys), (tokens, size)) * decay @ basis * scale

    inputs = {"qkv": 576, "o": 576, "mlp": 576, "down": 1536}
    inputs = {name: rows(size, large=30.0) for name, size in inputs.items()}
    kernels = {
        n: jax.random.normal(next(keys), s) * jnp.arange(1, s[1] + 1) ** -0.2
        for n, s in SHAPES.items()
    }
    gradients = {name: 1e-3 * rows(shape[1], large=1.0) for name, shape in SHAPES.items()}
    return inputs, kernels, gradients


gram = jax.jit(lambda rows: matmul(rows.mT, rows))


def timed(function):
    """`(wall seconds, CPU seconds)` and the result."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = jax.block_until_ready(function())
    return np.array([time.perf_counter(), time.process_time()]) - start, result


def build(layer, two_sided, route):
    """Times for moments and for factors, the factors and their weights, of one layer."""
    inputs, kernels, gradients = layer
    if route == "ours":  # One moment per input group.
        seconds, shared = timed(lambda: {name: gram(rows) for name, rows in inputs.items()})
        moments = {name: shared[INPUTS[name]] for name in kernels}
    else:
        seconds, moments = timed(lambda: {n: gram(inputs[INPUTS[n]]) for n in kernels})
    outer = {n: gram(gradients[n]) if two_sided else None for n in kernels}
    jax.block_until_ready(outer)

    def factor(name):
        kernel, moment, gradient = kernels[name], moments[name], outer[name]
        rank = int(kernel.shape[0] * kernel.shape[1] * RATIO / sum(kernel.shape))
        if route == "ours":
            return factorize(kernel, moment, gradient, max_rank=rank).truncate(rank)
        return textbook(kernel, moment, gradient, rank)

    factor_seconds, factors = timed(lambda: {name: factor(name) for name in kernels})
    return seconds, factor_seconds, factors, moments, outer


def error(kernel, factors, moment, gradient):
    """Weighted error of `left @ right`, in float64, under the damping of the two-sided form."""
    gap = np.float64(kernel) - np.float64(factors[0]) @ np.float64(factors[1])
    c = np.float64(moment)
    if gradient is None:
        return np.sqrt(np.sum(gap * (c @ gap)))
    c = c + DAMPING * np.trace(c) / len(c) * np.eye(len(c))
    g = np.float64(gradient)
    g = g + DAMPING * np.trace(g) / len(g) * np.eye(len(g))
    return np.sqrt(np.sum(gap * (c @ gap @ g)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    layers = [make_layer(key) for key in jax.random.split(jax.random.key(0), 3)]
    print(f"{arguments.layers} layers, ratio {RATIO}, {jax.devices()[0].device_kind}")
    for two_sided in (False, True):
        seconds = {route: np.zeros((2, 2)) for route in ("ours", "textbook")}
        for route in seconds:
            build(layers[0], two_sided, route)  # compile
        worst = 0.0
        for i in range(arguments.layers):  # Interleaved, so that other load on the machine is fair.
            layer = layers[i % len(layers)]
            results = {route: build(layer, two_sided, route) for route in seconds}
            for route, (moments, factors, *_) in results.items():
                seconds[route] += [moments, factors]
            if i < len(layers):
                weights = results["ours"][3:]
                for name, kernel in layer[1].items():
                    ours, book = (
                        error(kernel, results[r][2][name], weights[0][name], weights[1][name])
                        for r in ("ours", "textbook")
                    )
                    worst = max(worst, ours / book)
        name = "two-sided" if two_sided else "one-sided"
        for kind, clock in enumerate(("wall", "CPU")):
            mine, book = seconds["ours"][:, kind], seconds["textbook"][:, kind]
            print(
                f"{name}, {clock} seconds: ours {mine[1]:.1f}, textbook {book[1]:.1f}, ratio "
                f"{mine[1] / book[1]:.3f}; with input moments of 2048 tokens per layer "
                f"{mine.sum() / book.sum():.3f}"
            )
        print(f"{name}, largest error ours / textbook: {worst:.5f}", flush=True)


if __name__ == "__main__":
    main()
