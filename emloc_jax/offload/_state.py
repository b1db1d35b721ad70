"""All that a trainer carries from step to step, as one pytree."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emloc_jax.errors import ResumeError
from emloc_jax.offload._block_slot import BlockSlot

__all__ = ["PipelineState", "read_state", "write_state"]

FIELDS = ("params", "pairs", "moments", "device_moments", "extras")


@struct.dataclass
class PipelineState:
    """A drained trainer: with the same options and data it goes on bit for bit.

    Attributes:
      steps: () int32, steps done, skipped ones included.
      skipped: () int32.
      outer: what belongs to the parameters outside the blocks: `params`, `moments` and so on.
      blocks: the same per block, with its projectors; `errors` holds each pair's last error, NaN
        before its first check.
    """

    steps: jax.Array
    skipped: jax.Array
    outer: dict[str, Any]
    blocks: list[dict[str, Any]]


def read_state(
    steps: int, skipped: int, outer: BlockSlot, blocks: list[BlockSlot]
) -> PipelineState:
    """The state of drained slots; shares their buffers."""
    return PipelineState(
        jnp.int32(steps), jnp.int32(skipped), _read(outer), [_read(slot) for slot in blocks]
    )


def write_state(state: PipelineState, outer: BlockSlot, blocks: list[BlockSlot]) -> tuple[int, int]:
    """Puts a state into drained slots; returns the numbers of steps done and skipped.

    Raises:
      ResumeError: it belongs to other options or another model.
    """
    present = read_state(0, 0, outer, blocks)
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
    del present  # the old arrays go as the new ones come
    for slot, saved in zip([outer, *blocks], [state.outer, *state.blocks], strict=True):
        # Copies, since training consumes what it holds; each where its predecessor was.
        for field in FIELDS:
            setattr(slot, field, jax.tree.map(_like, saved[field], getattr(slot, field)))
        errors = {path: float(error) for path, error in saved["errors"].items()}
        slot.errors = {path: error for path, error in errors.items() if error == error}
    return int(state.steps), int(state.skipped)


def _read(slot: BlockSlot) -> dict[str, Any]:
    known = {path: slot.errors.get(path, float("nan")) for path in slot.pairs}
    errors = {path: jnp.float32(error) for path, error in known.items()}
    return {field: getattr(slot, field) for field in FIELDS} | {"errors": errors}


def _like(saved: Any, present: jax.Array) -> jax.Array:
    return jax.device_put(saved, present.sharding, may_alias=False)


def _shapes(state: PipelineState) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(state)
    }
