"""New files and folders appear whole or not at all."""

import errno
import os
import shutil

import pytest

from emloc_jax._files import check_new, new_directory, new_file
from emloc_jax.errors import CheckpointError, OutputExistsError


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(params=[new_directory, new_file])
def new(request):
    return request.param


def write(partial, text="whole"):
    if partial.is_dir():
        (partial / "inner").mkdir()
        (partial / "inner" / "a.txt").write_text(text)
    else:
        partial.write_text(text)


def read(path):
    return (path / "inner" / "a.txt" if path.is_dir() else path).read_text()


def test_appears_at_the_end_with_its_parents(new, tmp_path):
    path = tmp_path / "x" / "y" / "out.json"
    with new(path) as partial:
        assert partial.parent == path.parent and partial.suffix == ".json"
        write(partial)
        assert not path.exists()
    assert read(path) == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_refuses_what_exists(new, tmp_path):
    for path in (tmp_path / "file", tmp_path / "folder", tmp_path / "dangling"):
        if path.name == "file":
            path.write_text("old")
        elif path.name == "folder":
            path.mkdir()
        else:
            path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputExistsError, match=path.name):
            with new(path):
                pytest.fail("the body must not run")
        with pytest.raises(OutputExistsError):
            check_new(path)
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(new, tmp_path, kind):
    with pytest.raises(kind):
        with new(tmp_path / "x" / "out") as partial:
            write(partial, "half")
            raise kind
    assert everything(tmp_path) == []


def test_overwrite_replaces_only_at_the_end(new, tmp_path):
    path = tmp_path / "out"
    with new(path) as partial:
        write(partial, "old")
    with pytest.raises(RuntimeError):
        with new(path, overwrite=True) as partial:
            write(partial, "half")
            raise RuntimeError
    assert read(path) == "old"
    with new(path, overwrite=True) as partial:
        write(partial, "new")
        assert read(path) == "old"
    assert read(path) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_someone_else_was_faster(new, tmp_path):
    with pytest.raises(OutputExistsError, match="appeared"):
        with new(tmp_path / "out") as partial:
            write(partial)
            (tmp_path / "out").write_text("theirs")
    assert everything(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "theirs"


def test_too_little_space_is_told_before_the_work(new, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(100, 93, 7))
    with pytest.raises(CheckpointError, match=r"1,000 bytes are needed; 7 bytes are free"):
        with new(tmp_path / "out", needs=1000):
            pytest.fail("the body must not run")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="No space left to write .*out") as caught:
        with new_directory(tmp_path / "x" / "out") as partial:
            write(partial)
            (partial / "big").symlink_to("/dev/full")
            with open(partial / "big", "wb", buffering=0) as file:
                file.write(b"0")
    assert "bytes are free" in str(caught.value) and caught.value.__cause__.errno == errno.ENOSPC
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("I/O error: No space left on device (os error 28)"),  # safetensors, orbax
        OSError("100000 requested and 8176 written"),  # numpy
    ],
)
def test_a_full_disk_told_by_another_library(new, tmp_path, error):
    with pytest.raises(CheckpointError, match="No space left"):
        with new(tmp_path / "out"):
            raise error
    assert everything(tmp_path) == []


def test_errors_of_other_files_stay_themselves(new, tmp_path):
    with pytest.raises(FileNotFoundError):
        with new(tmp_path / "out"):
            open(tmp_path / "an input that is missing")


def test_a_parent_that_is_a_file(new, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        with new(tmp_path / "file" / "out"):
            pytest.fail("the body must not run")


def test_a_file_that_was_never_written(tmp_path):
    with pytest.raises(CheckpointError, match="Nothing was written"):
        with new_file(tmp_path / "out"):
            pass
