"""The full spectrum of a factored kernel, of which every rank is a truncation."""

import dataclasses

import jax
import numpy as np

__all__ = ["Factorization"]


@dataclasses.dataclass(frozen=True)
class Factorization:
    """Factors in order of importance: the best rank-`r` kernel is `left[:, :r] @ right[:r]`.

    Rows of `right` have unit norm, so the factors are as well scaled as the kernel and survive
    storage in bf16. With leading stack axes, one factorization per stacked kernel.

    Attributes:
      left: `(*stack, d_in, max_rank)`.
      right: `(*stack, max_rank, d_out)`.
      squares: `(*stack, min(d_in, d_out))`, the squared singular values of the weighted kernel in
        descending order. Dropping the `i`-th direction costs exactly `squares[i]` (the tail
        identity), so the squared error at rank `r` is `squares[r:].sum()`.
      weighting: `two_sided`, `one_sided` or `plain` (static).

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.emulator import factorize
      >>> full = factorize(jnp.diag(jnp.array([3.0, 2.0, 1.0])), max_rank=3)
      >>> left, right = full.truncate(2)
      >>> left.shape, right.shape, [round(float(e), 3) for e in full.relative_errors()]
      ((3, 2), (2, 3), [1.0, 0.598, 0.267, 0.0])
    """

    left: jax.Array
    right: jax.Array
    squares: jax.Array
    weighting: str = "plain"

    @property
    def max_rank(self) -> int:
        """Largest rank that can be truncated to."""
        return self.left.shape[-1]

    def truncate(self, rank: int) -> tuple[jax.Array, jax.Array]:
        """`left (*stack, d_in, rank)` and `right (*stack, rank, d_out)`.

        Raises:
          ValueError: `rank` is not in `1..max_rank`.
        """
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"Rank {rank} is outside 1..{self.max_rank} of this factorization.")
        return self.left[..., :rank], self.right[..., :rank, :]

    def relative_errors(self) -> np.ndarray:
        """Weighted error over weighted norm at every rank `0..n`, stacked kernels taken together.

        Element `r` is `||C^1/2 (K - K_r) G^1/2||_F / ||C^1/2 K G^1/2||_F` with the weights that
        the factorization used (and their damping).
        """
        squares = np.asarray(self.squares, np.float64)
        squares = squares.reshape(-1, squares.shape[-1]).sum(axis=0)
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0)
        return np.sqrt(tails / (tails[0] or 1))


jax.tree_util.register_dataclass(
    Factorization, data_fields=["left", "right", "squares"], meta_fields=["weighting"]
)
