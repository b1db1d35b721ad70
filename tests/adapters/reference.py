"""The correction written out from its equations in float64 NumPy, one kernel at a time."""

import numpy as np


def corrected_product(
    lora_a, lora_b, kernel, emulated, *, scale, limit, moment=None, bound="row"
) -> np.ndarray:
    """`scale * a' @ b''`, (d_in, d_out)."""
    u, s, vt = np.linalg.svd(lora_a, full_matrices=False)
    learned = np.diag(s) @ vt @ lora_b
    error = kernel - emulated
    if moment is None:
        delta = u.T @ error / scale
    else:
        delta = np.linalg.solve(u.T @ moment @ u, u.T @ moment @ error) / scale
    size = {
        "row": lambda x: np.mean(np.abs(x), axis=1, keepdims=True),
        "kernel": lambda x: np.linalg.norm(x),
        "column": lambda x: np.linalg.norm(x, axis=0, keepdims=True),
    }[bound]
    gain = np.minimum(1.0, limit * size(learned) / size(delta))
    return scale * u @ (learned - gain * delta)
