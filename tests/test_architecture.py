"""The house keeps its floors: imports go down only, files stay small, torch stays out."""

import ast
from pathlib import Path

import pytest

import emloc_jax

ROOT = Path(emloc_jax.__file__).parent
# A room may import from itself and from the rooms listed for it.
GROUND = {"errors", "_files", "_bytes", "_compiling", "_program", "_program_memory"}
ALLOWED = {
    "errors": set(),
    "_bytes": {"errors"},
    "_files": {"errors"},
    "_compiling": set(),
    "_program_memory": set(),
    "_program": {"_program_memory"},
    "kernels": GROUND,
    "models": GROUND | {"kernels"},
    "emulator": GROUND | {"kernels"},
    "adapters": GROUND | {"kernels"},
    "offload": GROUND | {"kernels", "models"},
    "checkpoints": GROUND | {"kernels", "models", "emulator", "adapters", "offload"},
    "training": GROUND | {"kernels", "models", "offload"},
    "streaming": GROUND | {"kernels", "models", "emulator", "adapters", "checkpoints", "training"},
}
ALLOWED["nnx"] = GROUND | {"kernels"}
ALLOWED["memory"] = GROUND | ALLOWED["streaming"] | {"offload", "streaming"}
ALLOWED["cli"] = ALLOWED["memory"] | {"memory"}
FILES = sorted(path for path in ROOT.rglob("*.py"))


def room(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def nodes(tree):
    """All nodes but those under `if TYPE_CHECKING`, which never runs."""
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from nodes(child)


def imported_modules(path):
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = room(path)
    for module in imported_modules(path):
        package = module.split(".")[0]
        assert package not in ("torch", "peft", "diffusers"), f"{path} imports {module}"
        if module.startswith("emloc_jax.") and own != "__init__":
            target = module.split(".")[1]
            assert target == own or target in ALLOWED[own], f"{own} must not import {module}"


def test_every_room_is_listed():
    assert {room(path) for path in FILES} == set(ALLOWED) | {"__init__"}


def test_imports_within_rooms_have_no_cycle():
    names = {".".join(("emloc_jax", *p.relative_to(ROOT).with_suffix("").parts)): p for p in FILES}
    graph = {n: {m for m in imported_modules(p) if m in names} for n, p in names.items()}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_, name])
        if name not in done:
            open_.append(name)
            for below in graph[name]:
                visit(below)
            done.add(open_.pop())

    for name in graph:
        visit(name)


def test_files_stay_small():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(sizes.values()) <= 400, max(sizes, key=lambda p: sizes[p])
    assert sorted(sizes.values())[len(sizes) // 2] < 150
