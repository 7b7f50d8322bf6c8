"""Unpacks a root file system tarball, plain or compressed, keeping everything that a tarball can say: see :mod:`.apply`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from ..api import Progress
from ..errors import ImportFailed
from .apply import apply_layer
from .compression import decompressed
from .tree import FileTree


class _Counted:
    """The tarball's file, telling how much of it has been read."""

    def __init__(self, file: BinaryIO, progress: Progress | None) -> None:
        self._file, self._progress, self._done = file, progress, 0
        self._size = os.fstat(file.fileno()).st_size

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._done += len(data)
        if self._progress:
            self._progress(self._done, self._size)
        return data


def unpack(path: Path, tree: FileTree, *, progress: Progress | None = None) -> None:
    """Unpacks the tarball (plain, gzip, xz, bzip2 or zstd) into the tree.

    Raises :class:`~thinpool.errors.ImportFailed`, naming the member, for a tarball that is damaged, cut short, or would
    write outside the tree, and OutOfSpace. What was unpacked until then stays.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ImportFailed(f"cannot read {path}: {error.strerror}") from error
    with file:
        try:
            apply_layer(decompressed(_Counted(file, progress)), tree, whiteouts=False)
        except ImportFailed as error:
            raise ImportFailed(f"{path}: {error}") from error
