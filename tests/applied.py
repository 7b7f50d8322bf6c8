"""Where layers are applied to in tests: a directory, and an ext4 that is not mounted."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filetrees import described

import thinpool
from thinpool.filesystems.apply import apply_layer
from thinpool.filesystems.blank import blank_layer
from thinpool.filesystems.tree import MountedTree


class Mounted:
    """Layers applied to a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    abandons = False  # what was applied before a failure stays

    def apply(self, layer: bytes, *, whiteouts: bool = True) -> None:
        with MountedTree(self.directory) as tree:
            apply_layer(io.BytesIO(layer), tree, whiteouts=whiteouts)

    @contextmanager
    def readable(self) -> Iterator[Path]:
        yield self.directory


class InExt4:
    """Layers applied to an ext4 that is not mounted; the kernel, and e2fsck, say what came of it."""

    abandons = True

    def __init__(self, pool: thinpool.Pool, directory: Path, name: str = "tree") -> None:
        self.directory = directory
        directory.mkdir()
        self.layer = blank_layer(pool, "ext4", 64 << 20).clone(name)

    def apply(self, layer: bytes, *, whiteouts: bool = True) -> None:
        ext4, ext4tree = pytest.importorskip("thinpool.filesystems.ext4"), pytest.importorskip("thinpool.filesystems.ext4tree")
        with ext4.Ext4(self.layer, writable=True) as filesystem:
            apply_layer(io.BytesIO(layer), ext4tree.Ext4Tree(filesystem), whiteouts=whiteouts)

    @contextmanager
    def readable(self) -> Iterator[Path]:
        device = self.layer.attach().device
        try:
            checked = subprocess.run(["e2fsck", "-fn", device], capture_output=True, text=True, timeout=60, check=False)
        finally:
            self.layer.detach()
        assert checked.returncode == 0, checked.stdout + checked.stderr
        self.layer.mount(self.directory, read_only=True)
        try:
            yield self.directory
        finally:
            self.layer.unmount()


def tree_of(target: Any) -> dict[str, dict[str, object]]:
    with target.readable() as directory:
        return described(directory, without=["lost+found"])


def names(target: Any) -> set[str]:
    return set(tree_of(target))
