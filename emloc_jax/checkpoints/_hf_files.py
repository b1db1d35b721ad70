"""The files of a Hugging Face folder that are not weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from emloc_jax.checkpoints._gguf_source import GgufSource
from emloc_jax.checkpoints._gguf_tokenizer import tokenizer_from_gguf
from emloc_jax.errors import UnsupportedArchitectureError

__all__ = ["copy_side_files", "write_gguf_side_files"]

_KINDS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}


def copy_side_files(
    source: Path, folder: Path, dtype: str | None, hf_config: dict[str, Any] | None = None
) -> None:
    """Copy config, generation config, tokenizer, chat template and licence of the base.

    Weights, their index, code and other folders stay where they are: nothing that is run, and
    nothing that describes other weights than those written.

    Args:
      source: folder of the base.
      folder: where the copy goes.
      dtype: the dtype to name in `config.json`, if it is another than the base's.
      hf_config: what to write as `config.json`; None: the base's.
    """
    for file in sorted(source.iterdir()):
        licence = file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        weights = file.name.endswith(".index.json") or file.name.startswith("adapter_")
        if file.is_file() and (licence or file.suffix in _KINDS) and not weights:
            shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    if hf_config is not None:
        _write_json(config, hf_config)
    text = json.loads(config.read_text(encoding="utf-8"))
    if dtype is not None and "_class_name" not in text:  # diffusers keeps no dtype there
        text["torch_dtype" if "torch_dtype" in text else "dtype"] = dtype
        _write_json(config, text)


def write_gguf_side_files(source: GgufSource, folder: Path, dtype: str) -> None:
    """Config, generation config and tokenizer in Hugging Face's form, from GGUF metadata.

    A tokenizer that cannot be rebuilt is left out: the model was loaded without it then.
    """
    config = source.hf_config | {"dtype": dtype}
    _write_json(folder / "config.json", config)
    tokens = {key: config[key] for key in config if key.endswith("_token_id")}
    _write_json(folder / "generation_config.json", tokens)
    try:
        tokenizer = tokenizer_from_gguf(source.metadata)
    except UnsupportedArchitectureError:
        return
    tokenizer.save_pretrained(folder)
    # transformers 5 writes the name of a class that version 4 does not know; both know this one.
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    _write_json(file, said | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
