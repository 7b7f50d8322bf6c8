"""A layer as a seekable binary file object, for shutil, tarfile and friends."""

from __future__ import annotations

import io
import os

from .api import Buffer, LayerAPI
from .errors import LayerDeleted, LayerSealed, OutOfRange, PoolClosed


class LayerFile(io.RawIOBase):
    """A layer as a file: reads, writes, seeks; its size is the layer's and does not change by writing."""

    _writable = False  # also where it could not be opened: it is closed then, too

    def __init__(self, layer: LayerAPI, mode: str) -> None:
        super().__init__()
        if mode not in ("rb", "r+b", "rb+"):
            raise ValueError(f'a layer opens as "rb" or "r+b", not {mode!r}')
        writable = "+" in mode
        if writable and layer.sealed:
            raise LayerSealed(f"layer {layer.name} is sealed and never changes; clone it and write to the clone")
        self._layer = layer
        self._writable = writable
        self._position = 0
        self.name = layer.name
        self.mode = "rb+" if self._writable else "rb"

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._writable

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._layer.size}.get(whence)
        if base is None:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence}")
        if base + offset < 0:
            raise OutOfRange(f"a position before the start: {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._layer.size - self._position))
        if count:
            self._layer.pread_into(view[:count], self._position)
            self._position += count
        return count

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        if not self._writable:
            raise io.UnsupportedOperation("not open for writing")
        count = self._layer.pwrite(data, self._position)
        self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        if size is not None and size != self._layer.size:
            raise io.UnsupportedOperation("a layer's size is changed by resize()")
        return self._layer.size

    def close(self) -> None:
        """Flushes the layer if it was open for writing."""
        if not self.closed:
            try:
                if self._writable:
                    self._layer.flush()
            except (PoolClosed, LayerDeleted):
                pass
            finally:
                super().close()
