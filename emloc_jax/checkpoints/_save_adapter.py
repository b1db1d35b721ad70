"""Adapters as a PEFT folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_jax._files import new_directory
from emloc_jax.adapters import Trainable, split_whole
from emloc_jax.checkpoints._adapter_head import PREFIX, HeadFiles, head_files
from emloc_jax.checkpoints._adapter_tensors import adapter_modules, adapter_tensors, provenance
from emloc_jax.checkpoints._peft_config import peft_config
from emloc_jax.checkpoints._peft_names import has_conv1d, linear_modules
from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.checkpoints._safetensors_write import planned_bytes, write_safetensors
from emloc_jax.models import CausalModel, Encoder, Flux

__all__ = ["save_adapter"]


def save_adapter(
    folder: str | os.PathLike,
    adapters: Mapping[str, Trainable],
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
    which limit; and of a classification head, which goes under `modules_to_save`, the names of its
    classes. For a FLUX pipeline of diffusers write `save_diffusers_adapter` instead.

    Args:
      folder: a new folder.
      adapters: {path: Adapter}, of the unrolled or the scanned tree, on kernels of `base`; and
        {path: Whole} of all of its classification head, see `head_parameters`.
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
        or a part of a head that was trained whole is missing, or one that the base lacked.
      NonFiniteError: a factor has infinite or NaN entries.
      CheckpointError: there are no adapters, or the disk is full.
    """
    lora, whole = split_whole(adapters)
    modules, head = adapter_modules(lora, base), head_files(whole, base)
    every = [module for module, _, _ in linear_modules(base.config).values()]
    causal = isinstance(base.model, CausalModel)
    config = peft_config(
        modules,
        every,
        base_name or str(base.source),
        dropout,
        task=_task(base, head),
        conv1d=has_conv1d(base.config),
        saved=head.modules,
    )
    plans, read_factor = adapter_tensors(modules, PREFIX)
    written = {plan.name for plan in head.plans}
    plans += head.plans

    def read(name: str) -> Any:
        return head.read(name) if name in written else read_factor(name)

    metadata = provenance(modules, base, limit) | head.metadata
    with new_directory(folder, overwrite, needs=planned_bytes(plans)) as partial:
        file = partial / "adapter_model.safetensors"
        write_safetensors(file, plans, read, metadata)
        text = json.dumps(config, indent=2) + "\n"
        (partial / "adapter_config.json").write_text(text, encoding="utf-8")
        loader = "AutoModelForCausalLM" if causal else base.config.class_name
        corrected = any(adapter.corrected for adapter in modules.values())
        library = "diffusers" if isinstance(base.model, Flux) else "transformers"
        card = _card(config, corrected, limit, base.source, library, loader, _options(head, base))
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(folder).absolute()


def _task(base: Pretrained, head: HeadFiles) -> str | None:
    """PEFT's task type; with that of text classifiers it looks for their head in the file."""
    if isinstance(base.model, Encoder) and head.modules:
        return "SEQ_CLS"
    return "CAUSAL_LM" if isinstance(base.model, CausalModel) else None


def _options(head: HeadFiles, base: Pretrained) -> str:
    return f", num_labels={base.config.num_labels}" if head.modules else ""


def _card(
    config: Mapping[str, Any],
    corrected: bool,
    limit: float | str | None,
    source: Path,
    library: str,
    loader: str,
    options: str,
) -> str:
    name = config["base_model_name_or_path"]
    load = f'"{name}"'
    if name == str(source) and source.suffix == ".gguf":
        load = f'"{source.parent}", gguf_file="{source.name}"'
    targets = config["target_modules"]
    targets = f"`{targets}`" if isinstance(targets, str) else ", ".join(targets)
    how = f"corrected for the original (limit {limit})" if corrected else "not corrected"
    return f"""---
base_model: {name}
library_name: peft
tags: [lora, emloc]
---

# LoRA adapter

Rank {config["r"]}, alpha {config["lora_alpha"]}, on {targets}
({how}). Made by emloc_jax.

```python
from peft import PeftModel
from {library} import {loader}

base = {loader}.from_pretrained({load}{options})
model = PeftModel.from_pretrained(base, "this folder")
```
"""
