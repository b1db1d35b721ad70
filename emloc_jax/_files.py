"""New files and folders: whole or not at all, and never on top of something that exists.

Everything the library writes is written under a temporary name beside its destination (so on the
same file system), flushed to the disk, and only then renamed. An error or an interrupt on the way
removes the temporary name again. A process killed outright can leave one behind: it starts with a
dot and carries `.partial-`, and may simply be deleted.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from emloc_jax.errors import CheckpointError, OutputExistsError

__all__ = ["check_new", "new_directory", "new_file"]

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# What other writers say of a full disk; the last is numpy's, whose error carries no number.
_FULL_WORDS = ("no space left on device", "os error 28", "disk quota exceeded", "requested and")


def check_new(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """The path, when something new may be written there.

    Call it before long work whose result goes to `path`, so that a name clash costs no time.

    Raises:
      OutputExistsError: `path` exists and `overwrite` is false.
      CheckpointError: a parent of `path` is not a folder, or cannot be written to.

    >>> check_new("a_name_that_is_not_there").name
    'a_name_that_is_not_there'
    """
    path = Path(path).absolute()
    if os.path.lexists(path) and not overwrite:
        kind = "folder" if path.is_dir() else "file"
        raise OutputExistsError(
            f"The output {kind} {path} exists already, and nothing existing is overwritten. "
            "Choose another name, or move the old one away."
        )
    parent = _first_existing(path.parent)
    if not parent.is_dir():
        raise CheckpointError(
            f"Cannot write {path}: {parent} is not a folder. Choose another path."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"Cannot write {path}: no permission to write in {parent}. Choose another path."
        )
    return path


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike, overwrite: bool = False, *, needs: int | None = None
) -> Iterator[Path]:
    """A folder that appears at `path` complete, at the end of the `with` block, or not at all.

    Args:
      path: where the folder shall be; missing parents are made.
      overwrite: replace an existing path, again only once the new folder is complete.
      needs: bytes that will be written, if known; checked against the free space at once.

    Yields:
      A temporary folder beside `path` to write into.

    Raises:
      OutputExistsError: `path` exists (see `check_new`).
      CheckpointError: the disk is full, or the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with new_directory(home + "/run") as folder:
    ...         _ = (folder / "note.txt").write_text("done")
    ...     sorted(p.name for p in Path(home, "run").iterdir())
    ['note.txt']
    """
    with _staged(path, overwrite, needs) as partial:
        partial.mkdir()
        yield partial


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike, overwrite: bool = False, *, needs: int | None = None
) -> Iterator[Path]:
    """A file that appears at `path` complete, at the end of the `with` block, or not at all.

    Args, raises: as for `new_directory`.

    Yields:
      A temporary path beside `path`, with the same suffix, to open and write.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with new_file(home + "/report.json") as file:
    ...         _ = file.write_text("{}")
    ...     Path(home, "report.json").read_text()
    '{}'
    """
    with _staged(path, overwrite, needs) as partial:
        yield partial
        if not partial.exists():
            raise CheckpointError(f"Nothing was written for {path}.")


@contextlib.contextmanager
def _staged(path: str | os.PathLike, overwrite: bool, needs: int | None) -> Iterator[Path]:
    path = check_new(path, overwrite)
    home = _first_existing(path.parent)
    if needs is not None and needs > (free := shutil.disk_usage(home).free):
        raise CheckpointError(_full(path, home, needs, free))
    mark = f".{path.stem}.partial-{secrets.token_hex(4)}"
    partial, made = path.with_name(mark + path.suffix), _missing(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        _move(partial, path, overwrite)
    except BaseException as error:
        _remove(partial)
        for folder in made:  # deepest first; one that others wrote into meanwhile stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        message = _disk_message(error, path, home, needs, partial)
        if message is None:
            raise
        raise CheckpointError(message) from error


def _move(partial: Path, path: Path, overwrite: bool) -> None:
    """Give the finished work its name; the old one, if any, goes only after that."""
    if not os.path.lexists(path):
        os.rename(partial, path)
    elif not overwrite:
        raise OutputExistsError(f"{path} appeared while it was being written; it was left alone.")
    elif partial.is_dir() or path.is_dir():
        old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            os.rename(old, path)
            raise
        _remove(old)
    else:
        os.replace(partial, path)
    _sync_one(path.parent)


def _first_existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _missing(path: Path) -> list[Path]:
    return [p for p in (path, *path.parents) if not p.exists()]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            if not child.is_symlink():
                _sync(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_message(
    error: BaseException, path: Path, home: Path, needs: int | None, partial: Path
) -> str | None:
    """What to tell about an error of the disk; None for any other error, which goes on as it is."""
    text = str(error).lower()
    full = any(word in text for word in _FULL_WORDS)
    if isinstance(error, OSError):
        full = full or error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full and isinstance(error, Exception):
        return _full(path, home, needs, shutil.disk_usage(home).free)
    if isinstance(error, OSError):
        ours = str(error.filename or "").startswith((str(partial), str(path)))
        if ours or error.errno in _DISK:
            return f"Cannot write {path}: {error.strerror or error}. Nothing was left behind."
    return None


def _full(path: Path, home: Path, needs: int | None, free: int) -> str:
    needed = "" if needs is None else f" {needs:,} bytes are needed;"
    return (
        f"No space left to write {path}:{needed} {free:,} bytes are free in {home}. "
        "Nothing was left behind. Free some space, or choose an output on another disk."
    )
