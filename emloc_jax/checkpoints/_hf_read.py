"""Parameters of a decoder from a checkpoint, one tensor at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.checkpoints._dtypes import NUMPY_DTYPES, WORDS, all_finite
from emloc_jax.checkpoints._hf_check import EMBEDDING, HEAD, listed
from emloc_jax.checkpoints._layers import scanned_path
from emloc_jax.checkpoints._source import WeightSource
from emloc_jax.errors import CheckpointError, ConfigError, NonFiniteError
from emloc_jax.kernels import flatten_leaves
from emloc_jax.models import DecoderConfig, hf_tensor_names

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
    source: WeightSource, config: DecoderConfig, dtype: np.dtype | None, scan_layers: bool
) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s, from the headers alone."""
    shapes: dict[str, Any] = {}
    for path, tensor in hf_tensor_names(config).items():
        # GGUF quantisations are dequantised to fp32.
        stored = NUMPY_DTYPES.get(source.tensors[tensor.name].dtype, NUMPY_DTYPES["F32"])
        shape = tensor.shape[::-1] if tensor.transpose else tensor.shape
        where, layer = scanned_path(path) if scan_layers else (path, None)
        stack = () if layer is None else (config.num_layers,)
        wanted = dtype or stored
        if where in shapes:  # layers stored in different types share the widest
            wanted = np.promote_types(wanted, shapes[where].dtype)
        shapes[where] = jax.ShapeDtypeStruct(stack + shape, wanted)
    return nest(shapes)


def read_params(
    source: WeightSource, config: DecoderConfig, dtype: np.dtype | None, scan_layers: bool
) -> dict[str, Any]:
    """The parameter tree in the arrays' stored dtype, or in `dtype`.

    Each tensor is read, transposed to (d_in, d_out) where Hugging Face stores (d_out, d_in), cast,
    and let go, so the peak is the parameters and one tensor (scanned: one stacked leaf).

    Raises:
      NonFiniteError: infinite or NaN weights, in the file or through the cast; all are listed.
      CheckpointError: a tied model carries a head that differs from its embedding.
    """
    names = hf_tensor_names(config)
    if config.tie_embeddings and HEAD in source.tensors:
        if not np.array_equal(source.read(HEAD), source.read(EMBEDDING)):
            raise CheckpointError(
                f"The config ties the head to the embedding, but {HEAD} differs from {EMBEDDING}. "
                "Set tie_word_embeddings to false in config.json if the head is its own."
            )
    shapes = flatten_leaves(parameter_shapes(source, config, dtype, scan_layers))
    infinite: list[str] = []
    stacked: dict[str, np.ndarray] = {}
    leaves: dict[str, jax.Array] = {}
    for path, tensor in names.items():
        where, layer = scanned_path(path) if scan_layers else (path, None)
        array = source.read(tensor.name)
        array = array.T if tensor.transpose else array
        if layer is None:
            target = np.empty(array.shape, shapes[where].dtype)
        else:
            if where not in stacked:
                stacked[where] = np.empty(shapes[where].shape, shapes[where].dtype)
            target = stacked[where][layer]
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
            target[...] = array
        if not all_finite(target):
            infinite.append(f"{tensor.name} ({source.tensors[tensor.name].file})")
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
