"""Safetensors' words for the floating types, and the numpy types they stand for."""

import ml_dtypes
import numpy as np

__all__ = ["NUMPY_DTYPES", "WORDS", "all_finite"]

NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
WORDS = {dtype: word for word, dtype in NUMPY_DTYPES.items()}

# An IEEE number is infinite or NaN exactly when all bits of its exponent are set.
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


def all_finite(array: np.ndarray) -> bool:
    """Whether no entry is infinite or NaN; reads the exponent bits, so it is fast for 16-bit too.

    >>> bool(all_finite(np.array([1.0, np.inf], np.float16)))
    False
    """
    exponent = _EXPONENT[WORDS[array.dtype]]
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return not bool(np.any((bits & exponent) == exponent))
