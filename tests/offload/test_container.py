"""Limits of control groups, from trees of files as kernels write them."""

import pytest

from emloc_jax.offload import _host_memory, container_memory, free_host_memory
from emloc_jax.offload._container import ContainerMemory

GB = 10**9
V1_UNLIMITED = 9223372036854771712


def group(folder, version, limit, used=0, cached=0):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("version", "mount", "line"),
    [(2, "", "0::/pod/box"), (1, "memory", "4:cpu,memory:/pod/box\n0::/elsewhere")],
)
def test_the_tightest_group_on_the_path_counts(tmp_path, version, mount, line):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text(line + "\n")
    assert container_memory(root, own) is None
    group(root / mount / "pod" / "box", version, V1_UNLIMITED if version == 1 else "max", 3 * GB)
    assert container_memory(root, own) is None
    group(root / mount / "pod", version, 8 * GB, used=5 * GB, cached=1 * GB)
    assert container_memory(root, own) == (8 * GB, 4 * GB)
    group(root / mount / "pod" / "box", version, 9 * GB, used=7 * GB)
    assert container_memory(root, own) == (8 * GB, 2 * GB)
    group(root / mount / "another", version, 1 * GB)
    assert container_memory(root, own) == (8 * GB, 2 * GB)


def test_inside_a_namespace_the_mount_itself_has_the_limit(tmp_path):
    group(tmp_path / "cgroup", 2, 2 * GB, used=3 * GB)
    assert container_memory(tmp_path / "cgroup", tmp_path / "none") == (2 * GB, 0)


def test_free_memory_respects_it(monkeypatch):
    monkeypatch.setattr(_host_memory, "container_memory", lambda: ContainerMemory(4096, 1024))
    assert free_host_memory() == 1024
