"""Factorizations on disk: another ratio is then only a truncation."""

import os
from collections.abc import Mapping

import jax.numpy as jnp

from emloc_jax.emulator._factorization import Factorization
from emloc_jax.emulator._tensor_file import read_tensors, write_tensors
from emloc_jax.errors import CheckpointError

__all__ = ["load_factorizations", "save_factorizations"]

_KIND = "factorizations"
_FIELDS = ("left", "right", "squares")


def save_factorizations(
    path: str | os.PathLike, factorizations: Mapping[str, Factorization]
) -> None:
    """Writes factorizations to a new safetensors file.

    Raises:
      OutputExistsError: `path` exists.
      CheckpointError: the disk is full, or the file cannot be written.
    """
    arrays = {
        f"{kernel}:{field}": getattr(factorization, field)
        for kernel, factorization in factorizations.items()
        for field in _FIELDS
    }
    index = {kernel: full.weighting for kernel, full in factorizations.items()}
    write_tensors(path, _KIND, index, arrays)


def load_factorizations(path: str | os.PathLike) -> dict[str, Factorization]:
    """Factorizations that `save_factorizations` wrote, in the same order.

    Raises:
      CheckpointError: the file is missing, truncated, corrupt, or holds something else.
    """
    index, tensors = read_tensors(path, _KIND)
    try:
        return {
            kernel: Factorization(
                *(jnp.asarray(tensors[f"{kernel}:{f}"]) for f in _FIELDS), weighting=weighting
            )
            for kernel, weighting in index.items()
        }
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks the array {error}; make it again.") from error
