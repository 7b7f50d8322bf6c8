"""Raw images: a layer from an image file or block device, and a sparse image file from a layer.

Import reads only what the source says is data (``SEEK_DATA``), skips zero chunks, and lets chunks that the pool has
already be shared: mmh3-128 finds a candidate, the engine compares the bytes (DESIGN.md, "Equal chunks").
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..api import Progress
from ..catalog import PARTIAL_LABEL
from ..engine import is_zero
from ..errors import NO_SPACE_ERRNOS, DiskError, ImportFailed, OutOfSpace, PoolExists
from ..sharing import Sharer

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

_PIECE_BYTES = 4 << 20
_BLOCK = 4096


def import_raw(pool: Pool, path: Path, name: str, *, labels: Mapping[str, str] | None = None, progress: Progress | None = None) -> Layer:
    """See :meth:`thinpool.Pool.import_raw`. The layer has its name, and no partial label, only once it is complete."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImportFailed(f"cannot read {path}: {error.strerror}") from error
    try:
        size = _source_size(fd, path)
        layer = pool.create_layer(name, size, labels={**(labels or {}), PARTIAL_LABEL: "1"})
        try:
            _Importer(pool, layer).run(fd, size, progress)
            layer.set_labels(labels or {})
            pool.commit()
        except BaseException:
            layer.delete()
            raise
        return layer
    finally:
        os.close(fd)


def _source_size(fd: int, path: Path) -> int:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ImportFailed(f"{path} is neither a file nor a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        raise ImportFailed(f"{path} is empty")
    return size


def _data_ranges(fd: int, size: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what the source holds, widened to whole steps; devices have no holes to tell of."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, end = position, size
        start = max(position, start // step * step)
        position = min(size, -(-end // step) * step)
        yield start, position


class _Importer:
    """Fills one layer."""

    def __init__(self, pool: Pool, layer: Layer) -> None:
        self._pool, self._layer = pool, layer
        self._chunk = pool.chunk_size
        self._sharer = Sharer(pool, layer)

    def run(self, fd: int, size: int, progress: Progress | None) -> None:
        """Copies the source, piece by piece."""
        buffer = bytearray(_PIECE_BYTES)
        for start, end in _data_ranges(fd, size, self._chunk):
            for offset in range(start, end, _PIECE_BYTES):
                length = min(_PIECE_BYTES, end - offset)
                view = memoryview(buffer)[:length]
                self._read(fd, view, offset)
                self._take(view, offset)
                if progress:
                    progress(offset + length, size)
        self._sharer.compare()
        if progress:
            progress(size, size)

    @staticmethod
    def _read(fd: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                raise DiskError(f"cannot read the image at {offset + done}: {error.strerror}", error.errno or errno.EIO) from error
            if count == 0:
                raise ImportFailed(f"the image became shorter while it was read, at {offset + done}")
            done += count

    def _take(self, piece: memoryview, offset: int) -> None:
        for start in range(0, len(piece), self._chunk):
            content = piece[start : start + self._chunk]
            if is_zero(content):
                continue
            if len(content) < self._chunk:
                self._layer.pwrite(content, offset + start)
                continue
            self._sharer.offer((offset + start) // self._chunk, bytes(content), written=False)


def export_raw(layer: Layer, path: Path, *, progress: Progress | None = None) -> None:
    """See :meth:`thinpool.layer.Layer.export_raw`. A regular file is made anew and appears only when complete; a block
    device is written over."""
    if path.is_block_device():
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.lseek(fd, 0, os.SEEK_END) < layer.size:
                raise OutOfSpace(f"the device {path} is smaller than layer {layer.name}")
            _write_out(layer, fd, progress, sparse=False)
        finally:
            os.close(fd)
        return
    if path.exists():
        raise PoolExists(f"{path} exists already")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, layer.size)
            _write_out(layer, fd, progress, sparse=True)
        finally:
            os.close(fd)
        os.rename(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in NO_SPACE_ERRNOS and not isinstance(error, OutOfSpace):
            raise OutOfSpace(f"no space for {path}") from error
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_out(layer: Layer, fd: int, progress: Progress | None, *, sparse: bool) -> None:
    """Data as it is but for zero blocks, which stay holes; on a device, where old bytes may lie, holes as zeros."""
    size = layer.size
    for extent in layer.extents():
        if extent.kind == "hole" and sparse:
            continue
        for offset in range(extent.offset, extent.offset + extent.length, _PIECE_BYTES):
            length = min(_PIECE_BYTES, extent.offset + extent.length - offset)
            piece = memoryview(layer.pread(length, offset) if extent.kind == "data" else bytes(length))
            for start, end in _pieces_to_write(piece, sparse=sparse):
                while start < end:
                    start += os.pwrite(fd, piece[start:end], offset + start)
            if progress:
                progress(offset + length, size)
    os.fsync(fd)
    if progress:
        progress(size, size)


def _pieces_to_write(piece: memoryview, *, sparse: bool) -> Iterator[tuple[int, int]]:
    if not sparse:
        yield 0, len(piece)
        return
    start: int | None = None
    for block in range(0, len(piece), _BLOCK):
        if is_zero(piece[block : block + _BLOCK]):
            if start is not None:
                yield start, block
            start = None
        elif start is None:
            start = block
    if start is not None:
        yield start, len(piece)
