"""All that a trainer carries from step to step, as one pytree."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emloc_jax.errors import ResumeError
from emloc_jax.kernels import SparseProjector, cache, uncache
from emloc_jax.offload._adam_update import Update
from emloc_jax.offload._block_slot import BlockSlot
from emloc_jax.offload._same_projectors import check_same_projectors

__all__ = ["PipelineState", "check_state", "read_state", "write_state"]

FIELDS = ("params", "moments", "device_moments", "extras")


@struct.dataclass
class PipelineState:
    """A drained trainer: with the same options and data it goes on bit for bit.

    Attributes:
      steps: () int32, steps done, skipped ones included.
      skipped: () int32.
      outer: what belongs to the parameters outside the blocks: `params`, `moments` and so on.
      blocks: the same per block, with its projectors: `pairs` without cached copies, `cached` with
        two flags for each, and `errors` with each pair's last error, NaN before its first check.
      held: of a delayed schedule, per slot (the outer one first) the `update` that is to be applied
        later, and whether there is one, `waits`.
    """

    steps: jax.Array
    skipped: jax.Array
    outer: dict[str, Any]
    blocks: list[dict[str, Any]]
    held: list[dict[str, Any]]


def read_state(
    steps: int, skipped: int, outer: BlockSlot, blocks: list[BlockSlot], *, held: Any = None
) -> PipelineState:
    """The state of drained slots; shares their buffers.

    Args:
      steps: done.
      skipped: of them.
      outer: what lies outside the blocks.
      blocks: all blocks.
      held: dtype of the wire if the schedule holds updates back, else None.
    """
    slots = [] if held is None else [outer, *blocks]
    return PipelineState(
        jnp.int32(steps),
        jnp.int32(skipped),
        _read(outer),
        [_read(slot) for slot in blocks],
        [_held(slot, held) for slot in slots],
    )


def check_state(state: PipelineState, present: PipelineState) -> None:
    """Refuses a state that does not fit the trainer whose own state is `present`.

    Raises:
      ResumeError: it belongs to other options or another model.
    """
    expected, found = _shapes(present), _shapes(state)
    different = sorted(
        f"{path}: {found.get(path, 'nothing')} instead of {expected.get(path, 'nothing')}"
        for path in expected.keys() | found.keys()
        if expected.get(path) != found.get(path)
    )
    if different:
        raise ResumeError(
            f"The saved state belongs to another model or to other options; {len(different)} "
            f"arrays differ, such as {'; '.join(different[:3])}. Go on with the first run's "
            "options."
        )
    check_same_projectors(state, present)


def write_state(state: PipelineState, outer: BlockSlot, blocks: list[BlockSlot]) -> tuple[int, int]:
    """Puts a state that `check_state` let pass into drained slots, but for what it holds back.

    Returns:
      The numbers of steps done and skipped.
    """
    for slot, saved in zip([outer, *blocks], [state.outer, *state.blocks], strict=True):
        # Copies, since training consumes what it holds; each where its predecessor was.
        for field in FIELDS:
            setattr(slot, field, jax.tree.map(_like, saved[field], getattr(slot, field)))
        for path, pair in saved["pairs"].items():
            bare = jax.tree.map(_like, pair, _bare(slot.pairs[path]))
            # Which products were chosen when the run began; they round differently.
            flags = zip(bare, saved["cached"][path], strict=True)
            slot.pairs[path] = tuple(cache(p) if flag else p for p, flag in flags)
        errors = {path: float(error) for path, error in saved["errors"].items()}
        slot.errors = {path: error for path, error in errors.items() if error == error}
    return int(state.steps), int(state.skipped)


def _read(slot: BlockSlot) -> dict[str, Any]:
    known = {path: slot.errors.get(path, float("nan")) for path in slot.pairs}
    return {field: getattr(slot, field) for field in FIELDS} | {
        "pairs": {path: _bare(pair) for path, pair in slot.pairs.items()},
        "cached": {
            path: jnp.array([_cached(p) for p in pair]) for path, pair in slot.pairs.items()
        },
        "errors": {path: jnp.float32(error) for path, error in known.items()},
    }


def _bare(pair: Any) -> tuple[SparseProjector | None, ...]:
    """The pair without cached copies, which follow from the rest."""
    return tuple(None if p is None else uncache(p) for p in pair)


def _cached(p: SparseProjector | None) -> bool:
    return p is not None and p.cached is not None


def _held(slot: BlockSlot, wire: Any) -> dict[str, Any]:
    """The update that waits for its step; zeros where there is none."""
    held = slot.held()
    if held is not None:
        return {"waits": jnp.bool_(True), "update": held.update}
    zeros = {path: jnp.zeros(own.mu.shape, wire) for path, own in slot.moments.items()}
    return {"waits": jnp.bool_(False), "update": Update(zeros, jnp.float32(0))}


def _like(saved: Any, present: jax.Array) -> jax.Array:
    return jax.device_put(saved, present.sharding, may_alias=False)


def _shapes(state: PipelineState) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(state)
    }
