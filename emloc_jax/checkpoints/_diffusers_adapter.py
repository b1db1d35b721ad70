"""Adapters in the form that the LoRA loaders of diffusers read: one file, config in its header."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from emloc_jax._files import new_directory
from emloc_jax.adapters import Adapter, lora_alone
from emloc_jax.checkpoints._adapter_tensors import adapter_modules, adapter_tensors, provenance
from emloc_jax.checkpoints._peft_config import PeftScales, peft_config, scales_of_config
from emloc_jax.checkpoints._peft_names import linear_modules
from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.checkpoints._safetensors_read import SafetensorsSource
from emloc_jax.checkpoints._safetensors_write import planned_bytes, write_safetensors
from emloc_jax.errors import AdapterMismatchError
from emloc_jax.models import Flux

__all__ = ["DIFFUSERS_WEIGHTS", "diffusers_scales", "is_alpha", "save_diffusers_adapter"]

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PREFIX, _CONFIG = "transformer.", "lora_adapter_metadata"
_ALPHA = re.compile(r"transformer\.(.+)\.alpha")
_B = re.compile(r"transformer\.(.+)\.lora_B\.weight")


def save_diffusers_adapter(
    folder: str | os.PathLike,
    adapters: Mapping[str, Adapter],
    *,
    base: Pretrained,
    limit: float | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write adapters for `FluxPipeline.load_lora_weights(folder)`.

    The folder gets `pytorch_lora_weights.safetensors`, with tensors named
    `transformer.MODULE.lora_A.weight` and the ranks and alphas in its header, as diffusers itself
    writes it (0.35 and later), and the provenance that `save_adapter` notes. `load_adapter` reads
    it back.

    Args:
      folder: a new folder.
      adapters: {path: Adapter}, of the unrolled or the scanned tree, on kernels of `base`.
      base: the FLUX transformer that the adapters belong to.
      limit: the bound that the correction used, if any.
      overwrite: replace an existing folder, once the new one is complete.

    Returns:
      The folder's absolute path.

    Raises:
      OutputExistsError: the folder exists.
      AdapterMismatchError: the base is no model of diffusers, or an adapter does not fit it.
      NonFiniteError: a factor has infinite or NaN entries.
      CheckpointError: the disk is full.
    """
    if not isinstance(base.model, Flux):
        raise AdapterMismatchError(
            f"The base is a {type(base.model).__name__}, which diffusers does not know. Write a "
            "PEFT folder with save_adapter."
        )
    modules = adapter_modules(lora_alone(adapters, "A file of diffusers"), base)
    every = [module for module, _, _ in linear_modules(base.config).values()]
    config = peft_config(modules, every, str(base.source), 0.0, task=None)
    plans, read = adapter_tensors(modules, _PREFIX)
    said = {_PREFIX + key: value for key, value in config.items()}
    metadata = provenance(modules, base, limit) | {_CONFIG: json.dumps(said, sort_keys=True)}
    with new_directory(folder, overwrite, needs=planned_bytes(plans)) as partial:
        write_safetensors(partial / DIFFUSERS_WEIGHTS, plans, read, metadata)
    return Path(folder).absolute()


def diffusers_scales(source: SafetensorsSource) -> PeftScales:
    """Ranks and alphas of such a file.

    They are in the header; older files have none, and then the rank is the factors' and alpha
    their `MODULE.alpha`, or the rank where there is none, as diffusers takes it.

    Args:
      source: the open file.

    Raises:
      CheckpointError: the header's config cannot be read.
      AdapterMismatchError: it asks for more than plain LoRA.
    """
    file = source.files[0]
    said = source.metadata[file].get(_CONFIG)
    if said is not None:
        return scales_of_config(said, file, prefix=_PREFIX)
    matches = {name: _B.fullmatch(name) for name in source.tensors}
    ranks = {m[1]: source.tensors[name].shape[-1] for name, m in matches.items() if m}
    alphas = {module: float(rank) for module, rank in ranks.items()}
    for name in filter(is_alpha, source.tensors):
        alphas[name.removeprefix(_PREFIX).removesuffix(".alpha")] = float(source.read(name))
    exact = {module: f"^{re.escape(module)}" for module in ranks}
    return PeftScales(
        rank=1,
        alpha=1.0,
        rank_pattern={exact[module]: rank for module, rank in ranks.items()},
        alpha_pattern={exact[module]: alphas[module] for module in ranks},
        rslora=False,
    )


def is_alpha(name: str) -> bool:
    """Whether a tensor is the alpha of a module, as older files have it.

    >>> is_alpha("transformer.proj_out.alpha"), is_alpha("transformer.proj_out.lora_A.weight")
    (True, False)
    """
    return _ALPHA.fullmatch(name) is not None
