"""The rank of one kernel from a ratio or from a share of its energy."""

import numpy as np

from emloc_jax.errors import RatioError

__all__ = ["break_even_rank", "rank_for_energy", "rank_for_ratio"]


def break_even_rank(d_in: int, d_out: int) -> int:
    """Largest rank whose factors take fewer numbers than the kernel; 0 if there is none.

    Example:
      >>> break_even_rank(576, 1536), break_even_rank(4, 4), break_even_rank(5, 1)
      (418, 1, 0)
    """
    return (d_in * d_out - 1) // (d_in + d_out)


def rank_for_ratio(d_in: int, d_out: int, ratio: float) -> int:
    """`floor(d_in * d_out * ratio / (d_in + d_out))`, at least 1 (EMLoC, section 3.1).

    Raises:
      RatioError: `ratio` is not strictly between 0 and 1.

    Example:
      >>> rank_for_ratio(4096, 4096, 0.4), rank_for_ratio(14336, 4096, 0.4)
      (819, 1274)
    """
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise RatioError(
            f"Ratio {ratio!r} is not strictly between 0 and 1. It is the share of a kernel's "
            "parameters that is kept; to leave a kernel whole, put it into `skip`."
        )
    return max(1, int(d_in * d_out * ratio / (d_in + d_out)))


def rank_for_energy(squares: np.ndarray, energy: float) -> int:
    """Smallest rank that keeps `energy` of the squared weighted norm.

    Args:
      squares: `(..., n)` squared singular values in descending order; stacked kernels count
        together and get one rank.
      energy: strictly between 0 and 1; the squared relative error is at most `1 - energy`.

    Raises:
      RatioError: `energy` is out of range.

    Example:
      >>> rank_for_energy(np.array([8.0, 1.0, 1.0]), 0.85)
      2
    """
    if not isinstance(energy, (int, float)) or not 0 < energy < 1:
        raise RatioError(
            f"Energy {energy!r} is not strictly between 0 and 1. It is the share of each kernel's "
            "squared weighted norm that is kept."
        )
    squares = np.asarray(squares, np.float64)
    kept = np.cumsum(squares.reshape(-1, squares.shape[-1]).sum(axis=0))
    return int(np.searchsorted(kept, energy * kept[-1]) + 1)
