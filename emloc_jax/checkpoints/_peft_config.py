"""PEFT's `adapter_config.json`: what is written, and what of it can be honoured when read."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emloc_jax.adapters import Adapter
from emloc_jax.errors import AdapterMismatchError, CheckpointError

__all__ = ["PeftScales", "peft_config", "read_peft_config", "scales_of_config"]

# Options of peft.LoraConfig that change the forward pass, the base weights or the set of tensors
# in a way that an `Adapter` cannot express. They are refused unless unset.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# Options that matter only while training or while the adapter is made.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
}
# Initialisations after which the base keeps its own weights; the others (pissa, olora, corda,
# loftq, lora_ga) take something away from them.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class PeftScales(NamedTuple):
    """Rank and alpha of every module, as PEFT resolves them from defaults and patterns.

    `saved` is `modules_to_save`, modules that are no adapters and lie in the file whole.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    saved: tuple[str, ...] = ()

    def of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of one module; the first pattern that ends its name wins."""
        return (
            _resolve(self.rank_pattern, module, self.rank),
            _resolve(self.alpha_pattern, module, self.alpha),
        )


def peft_config(
    modules: Mapping[str, Adapter],
    every: Iterable[str],
    base_name: str,
    dropout: float,
    *,
    task: str | None = "CAUSAL_LM",
    conv1d: bool = False,
    saved: Sequence[str] = (),
) -> dict[str, Any]:
    """The `adapter_config.json` of adapters given by module name.

    Args:
      modules: one adapter per module, `model.layers.0.self_attn.q_proj`.
      every: all linear modules of the base, so that `target_modules` can be short.
      base_name: `base_model_name_or_path`.
      dropout: `lora_dropout`, which acts in further training only.
      task: PEFT's task type; None: none of them.
      conv1d: the base stores its kernels (d_in, d_out).
      saved: modules that are stored whole.

    Raises:
      AdapterMismatchError: some adapters use rsLoRA and others do not, which PEFT cannot say.
    """
    rslora = {adapter.rslora for adapter in modules.values()}
    if len(rslora) > 1:
        raise AdapterMismatchError(
            "Some adapters use rsLoRA and others do not; a PEFT adapter has one use_rslora for "
            "all. Save them as two adapters."
        )
    ranks = {module: adapter.rank for module, adapter in modules.items()}
    alphas = {module: _number(adapter.alpha) for module, adapter in modules.items()}
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    return {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": _targets(set(modules), every),
        "task_type": task,
        "use_dora": False,
        "use_rslora": rslora.pop(),
    }


def read_peft_config(folder: Path, *, conv1d: bool = False) -> PeftScales:
    """Scales of a PEFT LoRA folder, once everything in its config is known to be honoured.

    Args:
      folder: of the adapter.
      conv1d: the base stores its kernels (d_in, d_out), so that `fan_in_fan_out` belongs to it.

    Raises:
      CheckpointError: the file is missing or unreadable.
      AdapterMismatchError: it is no plain LoRA adapter; every offending option is named.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no adapter_config.json, so it is no PEFT adapter.")
    return scales_of_config(file.read_text(encoding="utf-8"), file, conv1d=conv1d)


def scales_of_config(
    text: str, file: Path, *, prefix: str = "", conv1d: bool = False
) -> PeftScales:
    """The same of a config's text.

    Args:
      text: JSON.
      file: where it was found, for messages.
      prefix: of the keys, as diffusers puts one before them.
      conv1d: see `read_peft_config`.

    Raises:
      CheckpointError: it is no PEFT config.
      AdapterMismatchError: see `read_peft_config`.
    """
    try:
        said = json.loads(text)
        config = {key.removeprefix(prefix): said[key] for key in said if key.startswith(prefix)}
        if conv1d:
            config.pop("fan_in_fan_out", None)
        refused = _unsupported(config)
        scales = PeftScales(
            int(config["r"]),
            float(config["lora_alpha"]),
            {key: int(value) for key, value in (config.get("rank_pattern") or {}).items()},
            {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            bool(config.get("use_rslora", False)),
            tuple(map(str, config.get("modules_to_save") or ())),
        )
        for pattern in (*scales.rank_pattern, *scales.alpha_pattern):
            re.compile(pattern)
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"{file} is no PEFT config: {error!r}. Get it again.") from error
    if refused:
        raise AdapterMismatchError(
            f"{file} asks for {', '.join(refused)}; only plain LoRA on linear layers is supported. "
            "Merge the adapter with peft's merge_and_unload, or train it without these options."
        )
    return scales


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    refused = [f"{key}={config[key]!r}" for key in _REFUSED if config.get(key)]
    if config.get("peft_type") != "LORA":
        refused.append(f"peft_type={config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        refused.append(f"init_lora_weights={config['init_lora_weights']!r}")
    unknown = set(config) - _HARMLESS - set(_REFUSED)
    return refused + [f"{key}={config[key]!r} (unknown)" for key in sorted(unknown) if config[key]]


def _patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the modules that have another: by last name where that suffices."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_end: dict[str, set[Any]] = {}
    for module, value in values.items():
        by_end.setdefault(_end(module), set()).add(value)
    patterns = {}
    for module, value in values.items():
        if value != common:
            end = _end(module)
            # A bare pattern is sought at the end of every name, `x.proj_out` for `proj_out`.
            whole = module if "." in module else f"^{module}"
            patterns[end if len(by_end[end]) == 1 else whole] = value
    return common, patterns


def _end(module: str) -> str:
    """The last part of a name, with what is before a number: `q_proj`, but `to_out.0`."""
    parts = module.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _targets(modules: set[str], every: Iterable[str]) -> list[str] | str:
    """`q_proj` where all modules of that name have an adapter, else the full names.

    A full name without a dot would also be found at the end of others (FLUX's last `proj_out` in
    those of its blocks), so then all is said by one regular expression.
    """
    ends: dict[str, set[str]] = {}
    for module in every:
        ends.setdefault(_end(module), set()).add(module)
    names = set()
    for module in modules:
        end = _end(module)
        names.add(end if ends.get(end, {module}) <= modules else module)
    found = {m for m in {*every, *modules} if any(f".{m}".endswith(f".{name}") for name in names)}
    return sorted(names) if found == modules else "|".join(map(re.escape, sorted(modules)))


def _resolve(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _number(value: float) -> float:
    return int(value) if math.isfinite(value) and value == int(value) else value
