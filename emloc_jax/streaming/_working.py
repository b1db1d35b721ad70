"""The folder in which a long stage keeps what it has finished, so that a killed run goes on."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emloc_jax._files import check_new, new_directory, new_file
from emloc_jax.errors import OutputExistsError, ResumeError

__all__ = ["WorkingFolder"]

_IDENTITY = "identity.json"


class WorkingFolder:
    """A folder `.NAME.partial-KIND` beside the output `NAME`, which is no result.

    It is made when work starts, kept when the process is killed or fails, and gone once the output
    is there. It says what it was started with, and is only ever gone on with under the very same.

    Args:
      output: the folder that the work is to make.
      kind: of the work, part of the name.
      identity: JSON types that decide the result: base, options, data.
      resume: go on with what an earlier run left; if there is nothing, start.

    Attributes:
      path: of the folder.
      output: as given, absolute.
      complete: the output is there already, and only this folder was left to remove.

    Raises:
      OutputExistsError: the output exists; or unfinished work, and `resume` is not set.
      ResumeError: the unfinished work was started with something else; all differences are told.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as home:
      ...     work = WorkingFolder(home + "/run", "note", {"seed": 1}, resume=False)
      ...     work.finish(lambda folder: (folder / "note.txt").write_text("done"))
      ...     sorted(path.name for path in Path(home).rglob("*"))
      ['note.txt', 'run']
    """

    def __init__(
        self, output: str | os.PathLike, kind: str, identity: Mapping[str, Any], *, resume: bool
    ):
        self.output = Path(output).absolute()
        self.path = self.output.with_name(f".{self.output.name}.partial-{kind}")
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        there = self.path.is_dir()
        if there and not resume:
            raise OutputExistsError(
                f"{self.path} holds unfinished work on {self.output}. Go on with it (resume), or "
                "delete that folder to start again."
            )
        self.complete = there and self.output.exists()
        if not self.complete:
            check_new(self.output)
        if there:
            self._compare(plain)
        else:
            with new_directory(self.path) as partial:
                (partial / _IDENTITY).write_text(json.dumps(plain, indent=1), encoding="utf-8")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def finish(self, write: Callable[[Path], Any], *, needs: int | None = None) -> None:
        """Writes the output, gives it its name, and removes this folder.

        Args:
          write: fills an empty folder.
          needs: bytes that it will write, if known.
        """
        result = self.path / "result"
        if result.exists():  # whole, but an earlier run was killed before it had its name
            shutil.rmtree(result)
        with new_directory(result, needs=needs) as partial:
            write(partial)
        self.hand_over(result)

    def hand_over(self, result: Path) -> None:
        """Gives a finished folder inside this one the output's name, and removes this folder."""
        check_new(self.output)
        os.rename(result, self.output)
        self.remove()

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file here in one step."""
        with new_file(self.path / name, overwrite=True) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    def _compare(self, identity: dict[str, Any]) -> None:
        try:
            found = json.loads((self.path / _IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(
                f"{self.path} does not say what it was started with ({error}). Delete it and start "
                "again."
            ) from error
        changed = [
            f"{key}: {found.get(key)} -> {identity.get(key)}"
            for key in sorted(found.keys() | identity.keys())
            if found.get(key) != identity.get(key)
        ]
        if changed:
            raise ResumeError(
                f"The unfinished work in {self.path} was started with something else:\n  "
                + "\n  ".join(changed)
                + "\nGo on with the old, or delete that folder to start again."
            )
