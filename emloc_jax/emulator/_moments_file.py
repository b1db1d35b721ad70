"""Second moments on disk."""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from emloc_jax.emulator._moments import SecondMoment, moment_arrays, moment_of_arrays
from emloc_jax.emulator._tensor_file import read_tensors, write_tensors
from emloc_jax.errors import CheckpointError

__all__ = ["load_moments", "save_moments"]

_KIND = "second moments"


def save_moments(path: str | os.PathLike, moments: Mapping[str, SecondMoment]) -> None:
    """Writes second moments to a new safetensors file; shared sums are stored once.

    Raises:
      OutputExistsError: `path` exists.
      CheckpointError: the disk is full, or the file cannot be written.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> moments = {"kernel": SecondMoment(sum=jnp.eye(2), count=jnp.float32(3))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_moments(folder + "/moments.safetensors", moments)
      ...     print(load_moments(folder + "/moments.safetensors")["kernel"].count)
      3.0
    """
    names: dict[int, str] = {}
    arrays: dict[str, jax.Array] = {}
    index: dict[str, dict[str, str]] = {}
    for kernel, moment in moments.items():
        index[kernel] = {}
        for field, array in moment_arrays(moment).items():
            name = names.setdefault(id(array), f"{kernel}:{field}")
            arrays[name] = array
            index[kernel][field] = name
    write_tensors(path, _KIND, index, arrays)


def load_moments(path: str | os.PathLike) -> dict[str, SecondMoment]:
    """Second moments that `save_moments` wrote; shared sums come back as one array.

    Raises:
      CheckpointError: the file is missing, truncated, corrupt, or holds something else.
    """
    index, tensors = read_tensors(path, _KIND)
    arrays = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    try:
        return {
            kernel: moment_of_arrays({field: arrays[name] for field, name in fields.items()})
            for kernel, fields in index.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} lists second moments that it does not hold ({error!r}); make it again."
        ) from error
