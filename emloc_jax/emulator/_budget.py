"""One byte budget shared out over kernels by their spectra."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from emloc_jax.errors import RatioError

__all__ = ["Share", "ranks_for_budget"]


@dataclasses.dataclass(frozen=True)
class Share:
    """What a kernel costs and gains.

    Attributes:
      gains: `gains[i]` is the error removed by the `i`-th rank, in descending order, for all ranks
        up to full rank.
      bytes_per_rank: cost of one more rank.
      bytes_whole: cost of the kernel when it is not factored.
      max_rank: largest rank that is smaller than the kernel.
    """

    gains: np.ndarray
    bytes_per_rank: int
    bytes_whole: int
    max_rank: int


def ranks_for_budget(
    shares: Mapping[str, Share], budget: int, *, min_rank: int = 1
) -> dict[str, int | None]:
    """Spends `budget` bytes where a byte removes most error.

    Tails of spectra are convex, so taking ranks in the order of gain per byte is the Lagrangian
    solution: no other choice of ranks has a lower total error at the bytes spent. A kernel that has
    all ranks up to its break-even point is kept whole if the rest of the budget allows.

    Args:
      shares: by path.
      budget: bytes for all kernels together.
      min_rank: no kernel gets less.

    Returns:
      Rank per path; None where the kernel stays whole.

    Raises:
      RatioError: `budget` is below what `min_rank` takes.

    Example:
      >>> even, steep = np.ones(6), 4.0 ** -np.arange(6)
      >>> shares = {"even": Share(even, 12, 36, 2), "steep": Share(steep, 12, 36, 2)}
      >>> ranks_for_budget(shares, 36)
      {'even': 2, 'steep': 1}
    """
    start = {path: min(min_rank, share.max_rank) for path, share in shares.items()}
    spent = sum(rank * shares[path].bytes_per_rank for path, rank in start.items())
    if budget < spent:
        raise RatioError(
            f"A budget of {budget:,} bytes is too small for {len(shares)} kernels: rank {min_rank} "
            f"everywhere takes {spent:,} bytes. Raise the budget or leave kernels out by `skip`."
        )
    ranks: dict[str, int | None] = dict(start)
    stopped: set[str] = set()
    for path, rank, cost in _by_gain(shares, start):
        if path in stopped:
            continue
        if spent + cost > budget:
            stopped.add(path)
            continue
        spent += cost
        ranks[path] = rank
    return ranks


def _by_gain(
    shares: Mapping[str, Share], start: Mapping[str, int]
) -> list[tuple[str, int | None, int]]:
    """`(path, next rank or None for whole, cost)`, largest gain per byte first."""
    steps = []
    for number, (path, share) in enumerate(shares.items()):
        gains = np.asarray(share.gains, np.float64)
        first, last = start[path], share.max_rank
        slopes = list(gains[first:last] / share.bytes_per_rank)
        ranks: list[int | None] = list(range(first + 1, last + 1))
        costs = [share.bytes_per_rank] * len(ranks)
        # The step from the last rank to the whole kernel removes all that is left. It cannot come
        # before the ranks below it, however much it gains.
        rest = share.bytes_whole - last * share.bytes_per_rank
        slope = gains[last:].sum() / max(rest, 1)
        slopes.append(min(slope, slopes[-1]) if slopes else slope)
        ranks.append(None)
        costs.append(rest)
        steps += [
            (-slope, number, order, path, rank, cost)
            for order, (slope, rank, cost) in enumerate(zip(slopes, ranks, costs, strict=True))
        ]
    return [step[3:] for step in sorted(steps, key=lambda step: step[:3])]
