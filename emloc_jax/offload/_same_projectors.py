"""Whether a saved state and a run have the same projectors."""

from typing import Any

import jax
import numpy as np

from emloc_jax.errors import ResumeError
from emloc_jax.kernels import SparseProjector

__all__ = ["check_same_projectors"]


def check_same_projectors(saved: Any, fresh: Any) -> None:
    """Refuses a saved state whose projectors have their non-zeros elsewhere than a fresh one's.

    Values are learnt, but positions stay, so they tell the projectors of one run from those of
    another with equal shapes. `PipelinedTrainer.load` and the training loop look by themselves.
    Whoever restores a state of `lsp_adamw` in a loop of their own asks here: the transformation
    goes on with the projectors of the state that it is given, whatever its own options say.

    Args:
      saved: any pytree with `SparseProjector`s in it, as restored.
      fresh: the state before the first step, `tx.init(params)`; one that holds shapes instead of
        arrays is not compared.

    Raises:
      ResumeError: a projector differs in shape or positions, or is there in one of them only.

    Example:
      >>> from emloc_jax.kernels import make_projector
      >>> state = {"up": make_projector(0, d=8, size=4, nnz=2)}
      >>> check_same_projectors(state, {"up": make_projector(0, d=8, size=4, nnz=2)})
      >>> check_same_projectors(state, {"up": make_projector(1, d=8, size=4, nnz=2)})
      Traceback (most recent call last):
      emloc_jax.errors.ResumeError: The saved state has other projectors than this run: 1 of 1...
    """
    found, expected = _projectors(saved), _projectors(fresh)
    different = sorted(
        path
        for path in found.keys() | expected.keys()
        if not _equal(found.get(path), expected.get(path))
    )
    if different:
        raise ResumeError(
            f"The saved state has other projectors than this run: {len(different)} of "
            f"{len(found.keys() | expected.keys())} differ in size or in where their non-zeros "
            f"are, such as '{different[0]}'. Resume with the first run's seed, subspace and nnz."
        )


def _projectors(tree: Any) -> dict[str, SparseProjector]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, SparseProjector))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if isinstance(leaf, SparseProjector)
    }


def _equal(one: SparseProjector | None, other: SparseProjector | None) -> bool:
    if one is None or other is None or (one.size, one.nnz) != (other.size, other.nnz):
        return False
    if any(isinstance(p.indices, jax.ShapeDtypeStruct) for p in (one, other)):
        return True
    return np.array_equal(one.indices, other.indices)
