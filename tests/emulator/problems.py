"""Factorisation problems with their optimum, in float64 numpy, by a route of its own."""

import dataclasses

import numpy as np

REGIMES = ("well_conditioned", "rank_deficient", "outlier_heavy", "fast_decay")
SHAPES = ((48, 32), (32, 48))
MAX_RANK = 19


@dataclasses.dataclass(frozen=True)
class Problem:
    kernel: np.ndarray
    inputs: np.ndarray
    gradients: np.ndarray

    def moments(self):
        """fp32 sums, as calibration makes them."""
        return self.inputs.T @ self.inputs, self.gradients.T @ self.gradients

    def spectrum(self, damping=None):
        """Singular values of the weighted kernel; `damping` None is one-sided and undamped."""
        left, right = self.roots(damping)
        return np.linalg.svd(left @ np.float64(self.kernel) @ right, compute_uv=False)

    def error(self, emulated, damping=None):
        """`||C^1/2 (K - K_E) G^1/2||` in float64."""
        left, right = self.roots(damping)
        gap = np.float64(self.kernel) - np.float64(emulated)
        return np.linalg.norm(left @ gap @ right)

    def roots(self, damping):
        if damping is None:  # The data itself is a root of its second moment.
            return np.float64(self.inputs), np.eye(self.kernel.shape[1])
        return tuple(_root(rows, damping) for rows in (self.inputs, self.gradients))


def _root(rows, damping):
    moment = np.float64(rows).T @ np.float64(rows)
    size = len(moment)
    moment += damping * np.trace(moment) / size * np.eye(size)
    values, vectors = np.linalg.eigh(moment)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def make_problem(regime, shape, seed=0):
    rng = np.random.default_rng([seed, *shape])

    def rows(size):
        tokens = rng.normal(size=(400, size))
        match regime:
            case "rank_deficient":  # fewer tokens than features
                tokens = tokens[:24]
            case "outlier_heavy":  # a few coordinates a thousand times larger, as in real models
                tokens[:, rng.choice(size, 2, replace=False)] *= 1e3
            case "fast_decay":
                basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
                tokens = tokens * np.exp(-8 * np.arange(size) / size) @ basis
        return tokens

    kernel = rng.normal(size=shape) / np.sqrt(shape[0])
    arrays = kernel, rows(shape[0]), 1e-3 * rows(shape[1])
    return Problem(*(a.astype(np.float32) for a in arrays))
