"""Adapters as a PEFT folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emloc_jax._files import new_directory
from emloc_jax.adapters import Adapter
from emloc_jax.checkpoints._adapter_layers import split_layers
from emloc_jax.checkpoints._fingerprint import base_fingerprint
from emloc_jax.checkpoints._hf_check import listed
from emloc_jax.checkpoints._peft_config import peft_config
from emloc_jax.checkpoints._peft_names import has_conv1d, linear_modules, tied_head_message
from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.checkpoints._safetensors_write import TensorPlan, planned_bytes, write_safetensors
from emloc_jax.errors import AdapterMismatchError
from emloc_jax.models import CausalModel

__all__ = ["save_adapter"]


def save_adapter(
    folder: str | os.PathLike,
    adapters: Mapping[str, Adapter],
    *,
    base: Pretrained,
    base_name: str | None = None,
    limit: float | str | None = None,
    dropout: float = 0.0,
    overwrite: bool = False,
) -> Path:
    """Write adapters as PEFT does: `adapter_model.safetensors`, `adapter_config.json`, README.

    PEFT's config has no place for provenance, so it goes into the safetensors metadata, which
    `adapter_info` reads: the base's fingerprint, whether the adapters were corrected, and with
    which limit.

    Args:
      folder: a new folder.
      adapters: {path: Adapter}, of the unrolled or the scanned tree, on kernels of `base`.
      base: the model the adapters belong to.
      base_name: what PEFT loads the base by; None: the base's folder or file.
      limit: the bound that the correction used, if any.
      dropout: the rate used in training.
      overwrite: replace an existing folder, once the new one is complete.

    Returns:
      The folder's absolute path.

    Raises:
      OutputExistsError: the folder exists.
      AdapterMismatchError: an adapter fits no linear layer of the base, or cannot be said in PEFT,
        or the base has a fresh head that stands in no file.
      NonFiniteError: a factor has infinite or NaN entries.
      CheckpointError: there are no adapters, or the disk is full.
    """
    if base.fresh:
        raise AdapterMismatchError(
            f"The adapter's base was loaded with a fresh head ({', '.join(base.fresh)}) that no "
            "file holds, so nobody could load it again. Write the base with save_pretrained, load "
            "that folder, and give it as the base."
        )
    linear = linear_modules(base.config)
    layers = split_layers(adapters)
    _match(layers, linear)
    modules = {linear[path][0]: adapter for path, adapter in layers.items()}
    every = [module for module, _, _ in linear.values()]
    causal = isinstance(base.model, CausalModel)
    config = peft_config(
        modules,
        every,
        base_name or str(base.source),
        dropout,
        task="CAUSAL_LM" if causal else None,
        conv1d=has_conv1d(base.config),
    )
    plans, sources = [], {}
    for module, adapter in modules.items():
        a, b = adapter.matrices()
        for letter, factor in (("A", a), ("B", b)):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            plans.append(TensorPlan(key, "F32", factor.shape[::-1]))
            sources[key] = factor
    corrected = any(adapter.corrected for adapter in layers.values())
    metadata = {
        "format": "pt",
        "emloc_jax.base_fingerprint": base_fingerprint(base),
        "emloc_jax.corrected": json.dumps(corrected),
        "emloc_jax.limit": json.dumps(limit),
    }
    with new_directory(folder, overwrite, needs=planned_bytes(plans)) as partial:
        file = partial / "adapter_model.safetensors"
        write_safetensors(file, plans, lambda key: np.asarray(sources[key]).T, metadata)
        text = json.dumps(config, indent=2) + "\n"
        (partial / "adapter_config.json").write_text(text, encoding="utf-8")
        loader = "AutoModelForCausalLM" if causal else base.config.class_name
        card = _card(config, corrected, limit, base.source, loader)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(folder).absolute()


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


def _card(
    config: Mapping[str, Any],
    corrected: bool,
    limit: float | str | None,
    source: Path,
    loader: str,
) -> str:
    name = config["base_model_name_or_path"]
    load = f'"{name}"'
    if name == str(source) and source.suffix == ".gguf":
        load = f'"{source.parent}", gguf_file="{source.name}"'
    how = f"corrected for the original (limit {limit})" if corrected else "not corrected"
    return f"""---
base_model: {name}
library_name: peft
tags: [lora, emloc]
---

# LoRA adapter

Rank {config["r"]}, alpha {config["lora_alpha"]}, on {", ".join(map(str, config["target_modules"]))}
({how}). Made by emloc_jax.

```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({load})
model = PeftModel.from_pretrained(base, "this folder")
```
"""
