"""A model as shapes: enough to compile its programs, without a weight."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.checkpoints import load_pretrained
from emloc_jax.errors import CheckpointError
from emloc_jax.kernels import KernelSpec, find_kernels
from emloc_jax.memory._image_kinds import kind_of
from emloc_jax.memory._model_kind import TextKind
from emloc_jax.models import model_from_hf

__all__ = ["AbstractModel", "abstract_model"]


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model of which only shapes are known.

    Attributes:
      name: where it came from, for messages.
      model: the module, with scanned layers: a language model, an InternVL or a FLUX.
      params: a tree of `jax.ShapeDtypeStruct`.
      kernels: what `find_kernels` found.
    """

    name: str
    model: Any
    params: Any
    kernels: dict[str, KernelSpec]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def kind(self) -> TextKind:
        """What it reads, and what a run computes of it.

        Raises:
          ConfigError: a model that cannot be planned.
        """
        return kind_of(self.model, self.name)


def abstract_model(
    source: str | Path | Mapping[str, Any],
    *,
    dtype: Any = jnp.bfloat16,
    compute_dtype: Any = jnp.bfloat16,
    name: str | None = None,
) -> AbstractModel:
    """The shapes of a model, from its `config.json` alone where there is one.

    Args:
      source: a folder or file of a Hugging Face `config.json`, its parsed content, a hub id, or a
        GGUF file.
      dtype: of the parameters.
      compute_dtype: of activations and matrix products.
      name: for messages; by default the source.

    Raises:
      CheckpointError: the file is not JSON, or the source cannot be read.
      ConfigError: it is no language model, InternVL or FLUX.
      UnsupportedArchitectureError: a family that is not implemented.

    Example:
      >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 8}
      >>> found = abstract_model({"model_type": "gpt2", **sizes})
      >>> found.parameters, found.params["layers"]["mlp"]["c_fc"]["kernel"].shape
      (7232, (2, 16, 64))
    """
    label = name or ("a model" if isinstance(source, Mapping) else str(source))
    options: dict[str, Any] = dict(dtype=jnp.dtype(compute_dtype), scan_layers=True, remat=True)
    config = source if isinstance(source, Mapping) else _read_config(Path(source))
    if config is None:
        found = load_pretrained(
            str(source),
            dtype=jnp.dtype(dtype),
            compute_dtype=options.pop("dtype"),
            tokenizer=False,
            abstract=True,
            **options,
        )
        model, params = found.model, found.params
    else:
        model, params = model_from_hf(config, param_dtype=jnp.dtype(dtype), **options), None
    inputs = kind_of(model, label).inputs()
    if params is None:
        params = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    params = jax.eval_shape(lambda tree: tree, params)
    return AbstractModel(label, model, params, find_kernels(model.apply, params, **inputs))


def _read_config(path: Path) -> dict[str, Any] | None:
    """The config of a folder or of a JSON file; None where the checkpoint itself must be asked."""
    file = path / "config.json" if (path / "config.json").is_file() else path
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON ({error}).") from error
