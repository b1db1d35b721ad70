"""The folder of a run: resolved configuration, stages as they finish, report."""

import json
import math
from pathlib import Path
from typing import Any

from emloc_jax._files import check_new, new_directory, new_file
from emloc_jax.cli._config import differences, to_yaml
from emloc_jax.errors import ResumeError

__all__ = ["Run", "check_run", "write_json"]


class Run:
    """A run folder. A stage's folder appears in it whole or not at all, so resuming is easy.

    Attributes:
      folder: path of the run.
      resumed: whether the folder was there before.
    """

    def __init__(self, config: Any, *, resume: bool):
        """Makes the folder, or opens it to resume.

        Args:
          config: has `output`; written as `config.yaml`.
          resume: go on with a folder that a run with this very configuration left.

        Raises:
          OutputExistsError: the folder exists and `resume` is not set.
          ResumeError: nothing to resume, or the configuration differs.
        """
        check_run(config, resume=resume)
        self.folder = Path(config.output)
        self.resumed = resume
        if not resume:
            with new_directory(self.folder) as partial:
                (partial / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the stage that makes `name` finished."""
        return (self.folder / name).exists()

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file, replacing an older one of this run in one step."""
        write_json(self.folder / name, content, overwrite=True)


def check_run(config: Any, *, resume: bool) -> None:
    """Refuses what `Run` would, without writing anything.

    Args:
      config: see `Run`.
      resume: see `Run`.

    Raises:
      OutputExistsError: the folder exists and `resume` is not set.
      ResumeError: nothing to resume, or the configuration differs.
    """
    folder = Path(config.output)
    if not resume:
        check_new(folder)
        return
    if not folder.exists():
        raise ResumeError(f"There is no run folder {folder} to resume.")
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise ResumeError(
            f"{folder} holds no config.yaml, so no run was started there. Start one "
            "without --resume, in a new folder."
        )
    changes = differences(saved.read_text(encoding="utf-8"), config)
    if changes:
        raise ResumeError(
            f"{folder} was started with another configuration:\n  "
            + "\n  ".join(changes)
            + "\nResume with the old one, or start a new run in a new folder."
        )


def write_json(path: Path, content: Any, *, overwrite: bool = False) -> None:
    """Writes JSON types in one step."""
    with new_file(path, overwrite=overwrite) as partial:
        text = json.dumps(_jsonable(content), indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def _jsonable(content: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings 'nan', 'inf' and '-inf'."""
    if isinstance(content, dict):
        return {key: _jsonable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_jsonable(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content
