"""Unpacks a root file system tarball, plain or compressed, keeping everything that a tarball can say: see :mod:`.apply`."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import IO, Any

from ..api import Progress
from ..errors import ImportFailed
from .apply import apply_layer
from .tree import FileTree

_PIECE_BYTES = 1 << 20
_BROKEN_STREAM = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)


class _Counted(io.RawIOBase):
    """The tarball's file, telling how much of it has been read."""

    def __init__(self, file: IO[bytes], progress: Progress | None) -> None:
        super().__init__()
        self._file, self._progress, self._done = file, progress, 0
        self._size = os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._done += count
        if self._progress:
            self._progress(self._done, self._size)
        return int(count)


def _decompressed(raw: io.BufferedReader, path: Path) -> Any:
    magic = raw.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(raw)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise ImportFailed(f"{path} is compressed with zstd: pip install 'thinpool[zstd]' to read it") from None
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return raw


def unpack(path: Path, tree: FileTree, *, progress: Progress | None = None) -> None:
    """Unpacks the tarball (plain, gzip, xz, bzip2 or zstd) into the tree.

    Raises :class:`~thinpool.errors.ImportFailed`, naming the member, for a tarball that is damaged, cut short, or would
    write outside the tree, and OutOfSpace. What was unpacked until then stays.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ImportFailed(f"cannot read {path}: {error.strerror}") from error
    with file:
        stream = _decompressed(io.BufferedReader(_Counted(file, progress), _PIECE_BYTES), path)
        try:
            apply_layer(stream, tree, whiteouts=False)
        except ImportFailed as error:
            raise ImportFailed(f"{path}: {error}") from error
        except _BROKEN_STREAM as error:
            raise ImportFailed(f"{path} is damaged: {error}") from error
        except Exception as error:
            if type(error).__module__.startswith("zstandard") or type(error).__name__ == "ZstdError":
                raise ImportFailed(f"{path} is damaged: {error}") from error
            raise
