"""Adapters from a PEFT folder, ours or made by torch `peft`."""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import Adapter, Trainable
from emloc_jax.checkpoints._adapter_head import read_head
from emloc_jax.checkpoints._adapter_layers import join_layers
from emloc_jax.checkpoints._diffusers_adapter import (
    DIFFUSERS_WEIGHTS,
    diffusers_scales,
    is_alpha,
)
from emloc_jax.checkpoints._dtypes import all_finite
from emloc_jax.checkpoints._fingerprint import base_fingerprint
from emloc_jax.checkpoints._hf_check import listed
from emloc_jax.checkpoints._peft_config import PeftScales, read_peft_config
from emloc_jax.checkpoints._peft_names import has_conv1d, linear_modules
from emloc_jax.checkpoints._pretrained import Pretrained, open_source
from emloc_jax.checkpoints._safetensors_read import SafetensorsSource
from emloc_jax.checkpoints._source import WeightSource
from emloc_jax.checkpoints._stored_names import stored_names
from emloc_jax.errors import AdapterMismatchError, NonFiniteError
from emloc_jax.models import hf_storage, layer_depths

__all__ = ["AdapterInfo", "adapter_info", "load_adapter"]

_KEY = re.compile(r"(?:base_model\.model|transformer)\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# With lm_head among the targets, PEFT stores copies of the base's own embedding or head as well.
_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")


class AdapterInfo(NamedTuple):
    """What an adapter folder says of its own making; all None for a foreign adapter."""

    base_fingerprint: str | None
    corrected: bool | None
    limit: float | str | None


def adapter_info(folder: str | os.PathLike) -> AdapterInfo:
    """Provenance of an adapter folder, from the metadata of its safetensors file.

    Raises:
      CheckpointError: the file is missing or corrupt.
    """
    return _info(_open(Path(folder)))


def load_adapter(
    folder: str | os.PathLike,
    base: Any,
    *,
    scan_layers: bool | None = None,
    check_base: bool = True,
) -> dict[str, Trainable]:
    """Read a PEFT LoRA folder into {path: Adapter}, in fp32, with its own alphas and rsLoRA.

    A classification head among its `modules_to_save` comes as {path: Whole} behind them.

    Args:
      folder: `adapter_model.safetensors` and `adapter_config.json`, or diffusers'
        `pytorch_lora_weights.safetensors`.
      base: the model that the adapters are for, or its config.
      scan_layers: paths and stacked factors of the scanned tree; None: as the base is.
      check_base: refuse an adapter of ours made for a base with another fingerprint. Foreign
        adapters carry none; of them names and shapes are checked. Needs a `Pretrained`.

    Raises:
      CheckpointError: a file is missing, truncated or corrupt.
      AdapterMismatchError: the adapter is no plain LoRA with or without such a head, or belongs to
        another base.
      NonFiniteError: a factor or the head has infinite or NaN entries.
    """
    folder = Path(folder)
    config = base.config if isinstance(base, Pretrained) else base
    source = _open(folder)
    if source.files[0].name == DIFFUSERS_WEIGHTS:
        scales = diffusers_scales(source)
    else:
        scales = read_peft_config(folder, conv1d=has_conv1d(config))
    info = _info(source)
    linear = {
        module: (path, *size)
        for in_files in (True, False)
        for path, (module, *size) in linear_modules(config, in_files=in_files).items()
    }
    own = _Own.of(base) if isinstance(base, Pretrained) else None
    whole, taken = read_head(source, config, scales.saved, folder)
    pairs = _pairs(source, taken, scales, linear, own, folder)
    if check_base and isinstance(base, Pretrained) and info.base_fingerprint is not None:
        if info.base_fingerprint != base_fingerprint(base):
            raise AdapterMismatchError(
                f"The adapter in {folder} was made for a base with other weights than "
                f"{base.source}. Load that base, or pass check_base=False if this is on purpose."
            )
    adapters, infinite = {}, []
    for module, keys in pairs.items():
        a, b = (source.read(keys[letter]).astype(np.float32) for letter in "AB")
        if not (all_finite(a) and all_finite(b)):
            infinite.append(module)
        adapters[linear[module][0]] = Adapter(
            jnp.asarray(np.ascontiguousarray(a.T)),
            jnp.asarray(np.ascontiguousarray(b.T)),
            alpha=scales.of(module)[1],
            rslora=scales.rslora,
            corrected=bool(info.corrected),
        )
    if infinite:
        raise NonFiniteError(
            f"The adapter in {folder} has infinite or NaN entries at:\n{listed(infinite)}"
        )
    if scan_layers is None:
        scan_layers = isinstance(base, Pretrained) and base.model.scan_layers
    joined = join_layers(adapters, layer_depths(config)) if scan_layers else adapters
    return {**joined, **whole}


def _open(folder: Path) -> SafetensorsSource:
    foreign = folder / DIFFUSERS_WEIGHTS
    return SafetensorsSource(
        [foreign if foreign.is_file() else folder / "adapter_model.safetensors"]
    )


def _info(source: SafetensorsSource) -> AdapterInfo:
    said = source.metadata[source.files[0]]
    corrected, limit = (said.get(f"emloc_jax.{key}", "null") for key in ("corrected", "limit"))
    return AdapterInfo(
        said.get("emloc_jax.base_fingerprint"), json.loads(corrected), json.loads(limit)
    )


def _pairs(
    source: SafetensorsSource,
    taken: Collection[str],
    scales: PeftScales,
    linear: Mapping[str, tuple[Any, ...]],
    own: "_Own | None",
    folder: Path,
) -> dict[str, dict[str, str]]:
    """Module -> {"A": key, "B": key}, once names, ranks and shapes are known to fit the base."""
    pairs: dict[str, dict[str, str]] = {}
    problems = []
    for key in source.tensors:
        if key in taken:
            continue
        match = _KEY.fullmatch(key)
        if match is None and (is_alpha(key) or (own is not None and own.has(source, key))):
            continue
        if match is None:
            problems.append(f"{key}: not a LoRA factor of a linear layer")
        elif match[1] not in linear:
            problems.append(f"{key}: the base has no linear layer {match[1]!r}")
        else:
            pairs.setdefault(match[1], {})[match[2]] = key
    for module, keys in pairs.items():
        _, d_in, d_out = linear[module]
        rank = scales.of(module)[0]
        for letter, wanted in (("A", (rank, d_in)), ("B", (d_out, rank))):
            found = source.tensors[keys[letter]].shape if letter in keys else None
            if found is None:
                problems.append(f"{module}: lora_{letter}.weight is missing")
            elif found != wanted:
                problems.append(f"{module}: lora_{letter} is {found}, not {wanted}")
    if problems or not pairs:
        raise AdapterMismatchError(
            f"The adapter in {folder} does not fit the base:\n"
            f"{listed(problems or ['it holds no LoRA factors'])}\n"
            "Load the base that it was trained for, and check that its files are whole."
        )
    return pairs


class _Own(NamedTuple):
    """The base's own tensors, and the names by which transformers' class knows them."""

    weights: WeightSource
    names: Mapping[str, str]

    @classmethod
    def of(cls, base: Pretrained) -> "_Own":
        weights = open_source(base.source)[0]
        return cls(weights, stored_names(weights.tensors, hf_storage(base.config)))

    def has(self, source: SafetensorsSource, key: str) -> bool:
        """Whether the tensor is what the base itself has under that name."""
        match = _COPY.fullmatch(key)
        asked = f"{match[1]}.weight" if match else ""
        name = self.names.get(asked, asked)
        if name not in self.weights.tensors:
            return False
        copy, own = source.read(key), self.weights.read(name)
        return np.array_equal(copy.astype(np.float32), own.astype(np.float32))
