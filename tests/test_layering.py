"""The layout shows the architecture: imports and includes only point down the picture in docs/DESIGN.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "thinpool"
CORE = ROOT / "csrc"

# Modules and sub-packages by rank: each may import from its own sub-package, and from lower ranks.
RANKS = {
    **dict.fromkeys(("errors", "_core", "_ext4", "metrics"), 0),
    **dict.fromkeys(("units", "api", "faults", "records", "closing"), 1),
    **dict.fromkeys(("engine", "catalog", "layerfile", "poolfiles"), 2),
    **dict.fromkeys(("metadata", "backups", "measuring", "trash", "deltas"), 3),
    "commits": 4,
    "recovery": 4,
    **dict.fromkeys(("layer", "digests", "holds", "limits", "policy", "compacting"), 5),
    "pool": 6,
    "sharing": 7,
    "exports": 8,
    "filesystems": 9,
    "images": 10,
    **dict.fromkeys(("containers", "healing"), 11),
    "server": 12,
    "__init__": 13,
    "containerd": 14,
    "cli": 15,
}
HEADER_RANKS = {
    "thinpool": 0,
    "common": 1,
    "nbd": 1,
    "throttle": 1,
    "codec": 2,
    "metrics": 2,
    "record": 2,
    "table": 3,
    "space": 4,
    "node": 4,
    "pool": 5,
    "checksum": 6,
    "map": 6,
    "io": 7,
}
HEADER_RANKS |= {"redo": 8, "fuse": 8}
FORBIDDEN_NAMES = re.compile(r"utils?|helpers?|manager|misc|common_utils", re.IGNORECASE)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The module, or the sub-package, that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path: Path) -> set[str]:
    """Rooms of the package that a file imports from, at run time."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
        if id(node) in typing_only:
            continue
        for name in names:
            if name == "thinpool" or name.startswith("thinpool."):
                inner = [*name.split("."), "__init__"][1]
                found.add(inner if inner in RANKS else "__init__")  # a name that the package itself defines
    return found


def external(path: Path) -> set[str]:
    """Top-level names of other packages that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    assert own in RANKS, f"{own} has no rank: say where it stands in the picture"
    up = {name for name in imported(path) if name != own and RANKS.get(name, 99) >= RANKS[own]}
    assert not up, f"{path.name} (rank {RANKS[own]}) imports from above: {up}"


def test_only_the_seams_import_what_lies_below() -> None:
    for path in modules():
        where = str(path.relative_to(PACKAGE))
        assert "lmdb" not in external(path) or where == "metadata.py", where
        assert "_ext4" not in imported(path) or where == "filesystems/ext4.py", where
        assert "_core" not in imported(path) or where in ("engine.py", "recovery/records.py") or room(path) == "exports", where


def test_only_the_command_line_reads_the_environment_and_prints() -> None:
    for path in modules():
        if room(path) == "cli" or path.name == "container_init.py":  # a program of its own, in the container's environment
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            environ = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not environ and not printing, f"{path.relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]


def headers(path: Path) -> set[str]:
    return set(re.findall(r'#include "([a-z0-9_]+)\.h"', path.read_text()))


def test_includes_point_down() -> None:
    for path in sorted(CORE.glob("*.h")):
        own = HEADER_RANKS[path.stem]
        for name in headers(path):
            assert HEADER_RANKS[name] < own or name == "codec", f"{path.name} includes {name}.h from above"


def test_exports_of_the_core_use_its_public_header_only() -> None:
    for export in ("fuse", "nbd"):
        for path in sorted(CORE.glob(f"{export}*.[ch]")):
            assert headers(path) <= {"thinpool", export, "common"}, path.name


def test_no_room_is_a_drawer() -> None:
    for path in [*modules(), *CORE.glob("*.[ch]")]:
        assert not FORBIDDEN_NAMES.fullmatch(path.stem), path


@pytest.mark.parametrize(("pattern", "limit"), [("csrc/*.[ch]", 500), ("thinpool/**/*.py", 480)])
def test_files_fit_in_the_head(pattern: str, limit: int) -> None:
    long = {str(p.relative_to(ROOT)): n for p in ROOT.glob(pattern) if (n := len(p.read_text().splitlines())) > limit}
    assert not long
