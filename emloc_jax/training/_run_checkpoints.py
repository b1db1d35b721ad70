"""Checkpoints of a run, by step, written by Orbax in the background."""

from __future__ import annotations

import dataclasses
import json
import logging
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from emloc_jax.errors import CheckpointError, ResumeError
from emloc_jax.offload import check_same_projectors
from emloc_jax.training._state import TrainState

__all__ = ["RunCheckpoints"]

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """The checkpoints below `folder`: train state, data position and config of each saved step.

    A checkpoint counts only once it is whole: Orbax writes it under another name and renames it
    at the end, so what a killed run leaves half-written is never seen.

    Args:
        folder: the checkpoints' own folder; made when the first one is written.
        keep: how many of the newest ones are kept.
    """

    def __init__(self, folder: str | PathLike[str], *, keep: int = 2):
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
        )

    def latest(self) -> int | None:
        """The newest step of which there is a whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: Any, config: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background.

        Raises:
            CheckpointError: this or an earlier checkpoint could not be written.
        """
        # A true copy: on a CPU device an array may be a view of the very buffer that the next
        # step, which consumes its state, writes over while Orbax still reads it.
        host = jax.tree.map(lambda x: np.array(x), _raw_key(state))
        run = {"data": data, "config": config, "structure": _structure(host)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(host), run=ocp.args.JsonSave(run))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._unwritten(step, error) from error

    def config(self, step: int) -> dict[str, Any]:
        """The config that was saved with `step`."""
        return self._run(step)["config"]

    def restore(self, step: int, template: TrainState) -> tuple[TrainState, Any]:
        """State and data position of `step`, the state in the template's structure and placement.

        Raises:
            ResumeError: the checkpoint is damaged, or made for another structure or with other
                projectors.
        """
        raw = _raw_key(template)
        run = self._run(step)
        differences = config_differences(run["structure"], _structure(raw))
        if differences:
            raise ResumeError(
                f"{self._folder}: checkpoint {step} was made with other trainables or another "
                f"optimizer: {'; '.join(differences[:5])}. Resume with the first run's settings."
            )
        expected = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), raw
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(expected))
        try:
            restored = self._manager.restore(step, args=args)["state"]
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise ResumeError(
                f"{self._folder}: checkpoint {step} is damaged ({_short(error)}); delete that "
                "step's folder to resume from the one before."
            ) from error
        check_same_projectors(restored, raw)
        key = jax.random.wrap_key_data(restored.rng, impl=jax.random.key_impl(template.rng))
        return dataclasses.replace(restored, rng=key), run["data"]

    def wait(self) -> None:
        """Returns once everything is written.

        Raises:
            CheckpointError: something could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(None, error) from error

    def close(self) -> None:
        """Waits for what is being written, and lets the folder go."""
        self._manager.close()

    def _run(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        try:
            return self._manager.restore(step, args=args)["run"]
        except Exception as error:
            raise ResumeError(
                f"{self._folder}: checkpoint {step} is damaged ({_short(error)}); delete that "
                "step's folder to resume from the one before."
            ) from error

    def _unwritten(self, step: int | None, error: Exception) -> CheckpointError:
        # The background's errors come out at the next call.
        which = "the last checkpoint" if step is None else f"checkpoint {step} or the one before"
        return CheckpointError(
            f"{self._folder}: {which} could not be written ({_short(error)}). Whole checkpoints "
            "are untouched: make room or mend the folder, then resume."
        )


def config_differences(saved: Any, asked: Any) -> list[str]:
    """Lines `key: saved …, asked …` for each dotted key whose values differ.

    Example:
        >>> config_differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
        ['a.b: saved 1, asked 3']
    """
    saved, asked = (_flatten(json.loads(json.dumps(c, default=str))) for c in (saved, asked))
    lines = []
    for key in sorted(saved.keys() | asked.keys()):
        old, new = saved.get(key, "nothing"), asked.get(key, "nothing")
        if old != new:
            lines.append(f"{key}: saved {old}, asked {new}")
    return lines


def _flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict) and tree:
        items = [_flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: json.dumps(tree)} if prefix else {}


def _raw_key(state: TrainState) -> TrainState:
    return dataclasses.replace(state, rng=jax.random.key_data(state.rng))


def _structure(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
