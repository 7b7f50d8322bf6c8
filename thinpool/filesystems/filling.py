"""A file system in a layer, opened as a tree of files to be filled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import NeedsRoot
from .ext4 import Ext4, available
from .ext4tree import Ext4Tree
from .tree import FileTree, MountedTree

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool


@contextmanager
def filling(pool: Pool, layer: Layer, filesystem: str) -> Iterator[FileTree]:
    """The tree of a layer that nobody else uses: through the file system library for ext4, by mounting it for XFS. Raises NeedsRoot."""
    if filesystem == "ext4" and available():
        with Ext4(layer, writable=True) as opened:
            yield Ext4Tree(opened)
        return
    if os.geteuid() != 0:
        raise NeedsRoot(f"filling an {filesystem} file system mounts it, which needs root (ext4 does without, built with libext2fs-dev)")
    directory = pool.path / "run" / f"import-{layer.id}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        layer.mount(directory)
        try:
            with MountedTree(directory) as tree:
                yield tree
        finally:
            layer.unmount()
    finally:
        directory.rmdir()
