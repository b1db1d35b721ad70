"""A pretrained model with everything that belongs to it."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from emloc_jax.checkpoints._fresh_head import with_labels
from emloc_jax.checkpoints._gguf_source import GgufSource
from emloc_jax.checkpoints._gguf_tokenizer import tokenizer_from_gguf
from emloc_jax.checkpoints._hf_check import check_tensors
from emloc_jax.checkpoints._hf_read import parameter_dtype, parameter_shapes, read_params
from emloc_jax.checkpoints._locate import locate
from emloc_jax.checkpoints._safetensors_read import STEMS, SafetensorsSource
from emloc_jax.errors import CheckpointError
from emloc_jax.models import Remat, config_from_hf, model_from_config

__all__ = ["Pretrained", "load_pretrained", "open_source"]

_log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its parameters, its tokenizer, and where they came from.

    Attributes:
      config: the model's shape: a `DecoderConfig`, `EncoderConfig`, `VisionConfig` and so on.
      model: the linen module, a `Decoder`, `Encoder`, `VisionEncoder` and so on;
        `model.apply({"params": params}, tokens)`, of an image encoder `(…, pixels)`.
      params: nested dictionary of arrays, or of `jax.ShapeDtypeStruct` if loaded abstract.
      tokenizer: a `transformers` tokenizer, or None.
      source: the folder or GGUF file it was read from (a hub id: its folder in the cache).
      hf_config: the parsed `config.json`, whole (for GGUF: one made from the metadata; with a
        fresh head: one that names it).
      fresh: paths (unrolled) of the parameters that `source` lacks and that were made afresh. The
        base's fingerprint, which is that of `source`, does not see them.
      unused: tensors of `source` that belong to other heads; `save_pretrained` keeps them, unless
        a head was made afresh.
    """

    config: Any
    model: Any
    params: dict[str, Any]
    tokenizer: Any
    source: Path
    hf_config: dict[str, Any]
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def load_pretrained(
    source: str | os.PathLike,
    *,
    dtype: Any = None,
    compute_dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: Remat = False,
    tokenizer: bool = True,
    abstract: bool = False,
    revision: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
) -> Pretrained:
    """Load a decoder of the Llama family, a GPT-2, an encoder, an InternVL, or a FLUX.

    Config, headers, file sizes, names and shapes are checked before any number is read; then each
    tensor is read from a memory map on its own. Every parameter must have exactly one tensor and
    every tensor exactly one parameter, but for buffers, repeated tied tensors and, in encoders,
    heads of other models (`Pretrained.unused`).

    An encoder's classification head is made afresh only if it is asked for by `num_labels`; what
    was made is told in `Pretrained.fresh` and in the log. Dropout is never applied.

    Args:
      source: a Hugging Face folder (one safetensors file, or shards with an index; of a diffusers
        pipeline the folder `transformer`), a hub id, or a `.gguf` file, which is dequantised to
        fp32.
      dtype: of the parameters; None: as stored.
      compute_dtype: of the computation, fp32 or bf16.
      scan_layers: stack the layers' parameters and scan over them.
      remat: what is kept of each block for the backward pass: none, block or dots (see
        `CausalModel`).
      tokenizer: load the tokenizer too, if there is one.
      abstract: give shapes and dtypes instead of arrays, from the headers alone, to plan with.
      revision: branch, tag or commit of a hub id.
      num_labels: put a classification head of so many labels on an encoder that has none. One
        that is there already must have this many.
      seed: of what is made afresh.

    Raises:
      CheckpointError: a file is missing, truncated, corrupt, or does not fit the config.
      ConfigError: an impossible option.
      NonFiniteError: infinite or NaN weights.
      UnsupportedArchitectureError: a family, or an option of one, that is not implemented.

    >>> load_pretrained("runs/no such folder")
    Traceback (most recent call last):
    emloc_jax.errors.CheckpointError: There is no runs/no such folder. Give a Hugging Face folder...
    """
    wanted = parameter_dtype(dtype)
    path = locate(source, revision)
    weights, hf_config = open_source(path)
    found = config = config_from_hf(hf_config, weights.tensors)
    if num_labels is not None:
        config = with_labels(config, num_labels, weights, str(path))
    stored = check_tensors(weights, config, str(path), fresh_head=num_labels is not None)
    if stored.unused:
        _log.info("%s: no use for %s.", path, ", ".join(stored.unused))
    if stored.fresh:
        _log.warning("%s lacks %s: made afresh.", path, ", ".join(stored.fresh))
    if stored.fresh or config != found:
        said = config.to_hf()
        if said["model_type"] != hf_config.get("model_type", said["model_type"]):
            hf_config = said  # the class with the head nests what the bare encoder says flat
        else:
            keys = ("architectures", "id2label", "label2id")
            hf_config = hf_config | {key: said[key] for key in keys}
    words = _tokenizer(path, weights) if tokenizer else None
    model = model_from_config(
        config,
        dtype=compute_dtype,
        param_dtype=jnp.float32 if wanted is None else wanted,
        scan_layers=scan_layers,
        remat=remat,
    )
    if abstract:
        params = parameter_shapes(weights, config, stored, wanted, scan_layers)
    else:
        params = read_params(weights, config, stored, wanted, scan_layers, seed)
    return Pretrained(config, model, params, words, path, hf_config, stored.fresh, stored.unused)


def open_source(path: Path) -> tuple[SafetensorsSource | GgufSource, dict[str, Any]]:
    """The weights at `path`, opened but not read, and their Hugging Face config.

    Raises:
      CheckpointError: see `load_pretrained`.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        source = GgufSource(path)
        return source, source.hf_config
    config = path / "config.json"
    if not config.is_file() and (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path} is a whole diffusers pipeline. Give the folder of its transformer, "
            f"{path / 'transformer'}."
        )
    if not config.is_file():
        raise CheckpointError(f"{path} holds no config.json, so it is no Hugging Face folder.")
    try:
        hf_config = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(hf_config, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise CheckpointError(f"{config} cannot be read: {error}. Get it again.") from error
    config_from_hf(hf_config)  # an unsupported model is told before missing weights are
    return SafetensorsSource.of_folder(path, STEMS["_class_name" in hf_config]), hf_config


def _tokenizer(path: Path, weights: SafetensorsSource | GgufSource) -> Any:
    if isinstance(weights, GgufSource):
        return tokenizer_from_gguf(weights.metadata)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # slow to import, so only where needed

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The tokenizer in {path} cannot be loaded: {error}. Repair its files, or load with "
            "tokenizer=False."
        ) from error
