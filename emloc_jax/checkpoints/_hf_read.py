"""Parameters of a model from a checkpoint, one tensor at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.checkpoints._dtypes import NUMPY_DTYPES, WORDS, all_finite
from emloc_jax.checkpoints._fresh_head import fresh_parameter
from emloc_jax.checkpoints._hf_check import Stored, listed
from emloc_jax.checkpoints._layers import depth_at, scanned_path
from emloc_jax.checkpoints._source import WeightSource
from emloc_jax.errors import CheckpointError, ConfigError, NonFiniteError
from emloc_jax.kernels import flatten_leaves
from emloc_jax.models import hf_tensor_names, layer_depths

__all__ = ["nest", "parameter_dtype", "parameter_shapes", "read_params"]


def parameter_dtype(dtype: Any) -> np.dtype | None:
    """The numpy dtype of a name or a JAX dtype; None stays None (as stored).

    Raises:
      ConfigError: it is not fp32, fp16 or bf16.

    >>> parameter_dtype("bfloat16")
    dtype(bfloat16)
    """
    if dtype is None:
        return None
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found not in WORDS:
        raise ConfigError(
            f"The parameter dtype {dtype!r} was asked for; choose float32, bfloat16 or float16."
        )
    return found


def parameter_shapes(
    source: WeightSource,
    config: Any,
    stored: Stored,
    dtype: np.dtype | None,
    scan_layers: bool,
) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s, from the headers alone.

    What is made afresh has the type of the first tensor, which is an embedding.
    """
    names = hf_tensor_names(config)
    depths = layer_depths(config)
    embedding = next(tensor for path, tensor in names.items() if path not in stored.fresh)
    shapes: dict[str, Any] = {}
    for path, tensor in names.items():
        like = embedding if path in stored.fresh else tensor
        name = stored.names[like.name]
        # GGUF quantisations are dequantised to fp32.
        found = NUMPY_DTYPES.get(source.tensors[name].dtype, NUMPY_DTYPES["F32"])
        where, layer = scanned_path(path) if scan_layers else (path, None)
        stack = () if layer is None else (depth_at(where, depths),)
        wanted = dtype or found
        if where in shapes:  # layers stored in different types share the widest
            wanted = np.promote_types(wanted, shapes[where].dtype)
        shapes[where] = jax.ShapeDtypeStruct(stack + tensor.parameter_shape, wanted)
    return nest(shapes)


def read_params(
    source: WeightSource,
    config: Any,
    stored: Stored,
    dtype: np.dtype | None,
    scan_layers: bool,
    seed: int = 0,
) -> dict[str, Any]:
    """The parameter tree in the arrays' stored dtype, or in `dtype`.

    Each tensor is read, transposed to (d_in, d_out) where Hugging Face stores (d_out, d_in), cast,
    and let go, so the peak is the parameters and one tensor (scanned: one stacked leaf).

    Args:
      source: an open checkpoint.
      config: the model's config.
      stored: from `check_tensors`.
      dtype: of the parameters, or None.
      scan_layers: stack the layers.
      seed: of the parameters that are made afresh.

    Raises:
      NonFiniteError: infinite or NaN weights, in the file or through the cast; all are listed.
      CheckpointError: a tied model carries a head that differs from its embedding.
    """
    _check_copies(source, stored)
    shapes = flatten_leaves(parameter_shapes(source, config, stored, dtype, scan_layers))
    infinite: list[str] = []
    stacked: dict[str, np.ndarray] = {}
    leaves: dict[str, jax.Array] = {}
    for path, tensor in hf_tensor_names(config).items():
        where, layer = scanned_path(path) if scan_layers else (path, None)
        if path in stored.fresh:
            spread = config.initializer_range
            array = fresh_parameter(path, tensor.parameter_shape, spread, seed)
        else:
            array = tensor.to_parameter(source.read(stored.names[tensor.name]))
        if layer is None:
            target = np.empty(array.shape, shapes[where].dtype)
        else:
            if where not in stacked:
                stacked[where] = np.empty(shapes[where].shape, shapes[where].dtype)
            target = stacked[where][layer]
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
            target[...] = array
        if not all_finite(target):
            name = stored.names[tensor.name]
            infinite.append(f"{name} ({source.tensors[name].file})")
        if layer is None:
            leaves[where] = jnp.asarray(target)
    if infinite:
        kept = "" if dtype is None else f" read as {dtype}"
        raise NonFiniteError(
            f"Infinite or NaN weights{kept} in {len(infinite)} tensor(s):\n{listed(infinite)}\n"
            "The checkpoint is damaged, or its range needs a wider dtype."
        )
    while stacked:
        where, array = stacked.popitem()
        leaves[where] = jnp.asarray(array)
    return nest(leaves)


def _check_copies(source: WeightSource, stored: Stored) -> None:
    for copy, of in stored.copies.items():
        if not np.array_equal(source.read(copy), source.read(of)):
            raise CheckpointError(
                f"{copy} is to be a copy of {of}, to which config.json ties it, but differs from "
                "it. If the model was trained untied and its class allows that, set "
                "tie_word_embeddings to false in config.json; else get the checkpoint again."
            )


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """A nested dictionary from '/'-joined paths.

    >>> nest({"norm/scale": 1})
    {'norm': {'scale': 1}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branch, name = path.split("/")
        node = tree
        for key in branch:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree
