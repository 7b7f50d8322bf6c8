"""Libraries that stand in front of the C library (``tests/preload``), by ``LD_PRELOAD``."""

from __future__ import annotations

import subprocess
from pathlib import Path


def build(name: str, directory: Path) -> Path:
    """Compiles that one into a directory."""
    library = directory / f"{name}.so"
    source = Path(__file__).with_name("preload") / f"{name}.c"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return library
