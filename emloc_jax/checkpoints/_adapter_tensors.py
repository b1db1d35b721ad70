"""Adapters as the tensors of a file, under the names that torch's modules have."""

import json
from collections.abc import Callable, Mapping

import numpy as np

from emloc_jax.adapters import Adapter
from emloc_jax.checkpoints._adapter_layers import split_layers
from emloc_jax.checkpoints._fingerprint import base_fingerprint
from emloc_jax.checkpoints._hf_check import listed
from emloc_jax.checkpoints._peft_names import linear_modules, tied_head_message
from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.checkpoints._safetensors_write import TensorPlan
from emloc_jax.errors import AdapterMismatchError

__all__ = ["adapter_modules", "adapter_tensors", "provenance"]


def adapter_modules(adapters: Mapping[str, Adapter], base: Pretrained) -> dict[str, Adapter]:
    """One adapter for each linear layer of torch's model that has one, by its name there.

    Args:
      adapters: {path: Adapter}, of the unrolled or the scanned tree.
      base: the model that they are for.

    Raises:
      AdapterMismatchError: see `save_adapter`.
    """
    linear = linear_modules(base.config)
    layers = split_layers(adapters)
    _match(layers, linear)
    return {linear[path][0]: adapter for path, adapter in layers.items()}


def adapter_tensors(
    modules: Mapping[str, Adapter], prefix: str
) -> tuple[list[TensorPlan], Callable[[str], np.ndarray]]:
    """The fp32 tensors `PREFIX MODULE.lora_A.weight` and `…lora_B.weight`, and what reads them.

    Args:
      modules: from `adapter_modules`.
      prefix: of every name.
    """
    plans, sources = [], {}
    for module, adapter in modules.items():
        a, b = adapter.matrices()
        for letter, factor in (("A", a), ("B", b)):
            key = f"{prefix}{module}.lora_{letter}.weight"
            plans.append(TensorPlan(key, "F32", factor.shape[::-1]))
            sources[key] = factor
    return plans, lambda key: np.asarray(sources[key]).T


def provenance(
    modules: Mapping[str, Adapter], base: Pretrained, limit: float | str | None
) -> dict[str, str]:
    """The header of an adapter's file: of which base, whether corrected, and with which limit."""
    corrected = any(adapter.corrected for adapter in modules.values())
    return {
        "format": "pt",
        "emloc_jax.base_fingerprint": base_fingerprint(base),
        "emloc_jax.corrected": json.dumps(corrected),
        "emloc_jax.limit": json.dumps(limit),
    }


def _match(layers: Mapping[str, Adapter], linear: Mapping[str, tuple[str, int, int]]) -> None:
    if not layers:
        raise AdapterMismatchError("There is no adapter to save. Give at least one.")
    problems = []
    for path, adapter in layers.items():
        if path.endswith("/embedding"):
            raise tied_head_message(path)
        if path not in linear:
            problems.append(f"{path}: the base has no such linear layer")
            continue
        a, b = adapter.matrices()
        found, wanted = (a.shape[0], b.shape[1]), linear[path][1:]
        if found != wanted:
            problems.append(f"{path}: the adapter is for {found}, the base has {wanted}")
    if problems:
        raise AdapterMismatchError(
            f"{len(problems)} adapter(s) do not fit the base:\n{listed(problems)}\n"
            "Save them with the base they were trained for."
        )
