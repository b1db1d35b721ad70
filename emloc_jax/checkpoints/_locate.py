"""Where a model is: a folder, a GGUF file, or a repository of the Hugging Face hub."""

import os
import re
from pathlib import Path

from emloc_jax.errors import CheckpointError

__all__ = ["locate"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]


def locate(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder or GGUF file that `source` names, downloaded first if it is a hub id.

    Args:
      source: a folder, a `.gguf` file, or `owner/name` on the hub. What exists on disk comes first.
      revision: branch, tag or commit, for a hub id only.

    Raises:
      CheckpointError: there is no such thing, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path.absolute()
    if path.exists():
        raise CheckpointError(
            f"{path} is a file, but not a .gguf one. Give the folder that holds config.json and "
            "the safetensors, or a .gguf file."
        )
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"There is no {source}. Give a Hugging Face folder, a .gguf file or a hub id such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return _download(str(source), revision)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_WANTED)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"There is no folder {repo!r} here, and it could not be had from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Check "
            "the name and the network (and HF_TOKEN for a gated model), or give a local folder."
        ) from error
    return Path(folder)
