"""Parameters as an Orbax checkpoint, for JAX users without Hugging Face's formats."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from emloc_jax._files import new_directory
from emloc_jax.errors import CheckpointError
from emloc_jax.kernels import flatten_leaves, is_box, peel

__all__ = ["load_orbax", "save_orbax"]

_PARAMS, _CONFIG = "params", "config.json"


def save_orbax(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    *,
    hf_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a parameter tree with Orbax, for inference.

    `orbax.checkpoint.StandardCheckpointer().restore(folder / "params")` reads it without this
    library; `load_orbax` reads it too.

    Args:
      folder: a new folder; the checkpoint is its `params`.
      params: nested dictionary of arrays; merge adapters and materialize other boxes first.
      hf_config: written beside it as `config.json`, so that the model can be rebuilt.
      overwrite: replace an existing folder, once the new one is complete.

    Returns:
      The folder's absolute path.

    Raises:
      OutputExistsError: the folder exists.
      CheckpointError: the tree holds boxes, or the disk is full.
    """
    import orbax.checkpoint as ocp  # slow to import, so only where needed

    leaves = flatten_leaves(params)
    boxed = [path for path, leaf in leaves.items() if is_box(peel(leaf))]
    if boxed:
        raise CheckpointError(
            f"{len(boxed)} parameters are boxed kernels ({boxed[0]}, …). Use merge(params, "
            "adapters) or materialize(params) before saving for inference."
        )
    arrays = jax.tree.map(peel, dict(params), is_leaf=lambda x: not isinstance(x, Mapping))
    needs = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    with new_directory(folder, overwrite, needs=needs) as partial:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / _PARAMS, arrays)
            checkpointer.wait_until_finished()
        if hf_config is not None:
            text = json.dumps(dict(hf_config), indent=2) + "\n"
            (partial / _CONFIG).write_text(text, encoding="utf-8")
    return Path(folder).absolute()


def load_orbax(folder: str | os.PathLike, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a parameter tree written by `save_orbax`.

    Args:
      folder: what `save_orbax` wrote.
      like: tree of arrays or `jax.ShapeDtypeStruct`s whose shapes, dtypes and shardings the result
        must have; None: as stored, on the default device.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or it does not fit `like`.
    """
    import orbax.checkpoint as ocp

    place = Path(folder).absolute() / _PARAMS
    if not place.is_dir():
        raise CheckpointError(f"There is no Orbax checkpoint {place}.")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            if like is None:
                shapes = dict(checkpointer.metadata(place).item_metadata or {})
                device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
                wanted = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
                )
            else:
                wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
            return checkpointer.restore(place, wanted)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"The Orbax checkpoint {place} cannot be read as asked: {error}. Check that it is "
                "whole, and that it is of this model."
            ) from error
