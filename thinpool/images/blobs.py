"""Archives of layers, kept in the pool as sealed layers of exactly their bytes: ``blob/DIGEST``.

They are what push and save give back, digest for digest. A :class:`Blob` is filled by one thread and may be read by others
meanwhile, each from its start on, as far as it is filled: so an archive is downloaded and unpacked at the same time.
"""

from __future__ import annotations

import hashlib
import io
import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ..api import Buffer, LayerAPI
from ..catalog import PARTIAL_LABEL
from ..errors import ImportFailed, LayerExists
from .oci import Descriptor
from .store import BLOB_LABEL, blob_name

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

PIECE_BYTES = 1 << 20


class Blob:
    """An archive on its way into the pool.

    ``expected``: what it should be, checked by :meth:`finish`; ``None`` for one that is made here, of at most ``size_limit`` bytes.
    """

    def __init__(self, pool: Pool, media_type: str, size_limit: int, expected: Descriptor | None = None) -> None:
        self._media_type, self._expected = media_type, expected
        self._hash = hashlib.sha256()
        self._complete = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self.filled = 0
        labels = {BLOB_LABEL: media_type, PARTIAL_LABEL: "1"}
        self.layer: Layer = pool.create_layer(f"thinpool/blob/{uuid.uuid4().hex}", max(size_limit, 1), labels=labels)

    @classmethod
    def expecting(cls, pool: Pool, descriptor: Descriptor) -> Blob:
        """One that is known already."""
        return cls(pool, descriptor.media_type, descriptor.size, descriptor)

    def write(self, data: Buffer) -> None:
        """Takes the next bytes. Raises ImportFailed where there are more than there should be."""
        if not data:
            return
        if self._expected is not None and self.filled + len(data) > self._expected.size:
            raise ImportFailed(f"{self._expected.digest} is longer than its {self._expected.size} bytes")
        self.layer.pwrite(data, self.filled)
        self._hash.update(data)
        with self._changed:
            self.filled += len(data)
            self._changed.notify_all()

    def finish(self) -> Descriptor:
        """All is written: what it is. Raises ImportFailed where that is not what it should be."""
        found = Descriptor(self._media_type, f"sha256:{self._hash.hexdigest()}", self.filled)
        if self._expected is not None and found.digest != self._expected.digest:
            what = f"ends after {found.size} of its {self._expected.size} bytes" if found.size < self._expected.size else f"is damaged: it is {found.digest}"
            raise ImportFailed(f"{self._expected.digest} {what}")
        if self.layer.size > max(self.filled, 1):
            self.layer.resize(max(self.filled, 1), allow_shrink=True)
        self.layer.seal()
        with self._changed:
            self._complete = True
            self._changed.notify_all()
        return found

    def fail(self, failure: BaseException) -> None:
        """There will be no more: who reads it is told."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def keep(self, descriptor: Descriptor) -> None:
        """Gives it its name, under :meth:`Pool.atomically`; one of that name that is there already is kept instead."""
        try:
            self.layer.rename(blob_name(descriptor.digest), labels={BLOB_LABEL: descriptor.media_type})
        except LayerExists:
            self.layer.delete()

    def discard(self) -> None:
        """Takes it out of the pool again."""
        self.layer.delete()

    def open(self) -> BinaryIO:
        """A stream over it that waits for what is not there yet, and raises what :meth:`fail` was told."""
        return cast(BinaryIO, io.BufferedReader(_Following(self), PIECE_BYTES))

    def wait_beyond(self, position: int) -> int:
        """Waits until there are more than ``position`` bytes, or it is complete; the bytes that are there."""
        with self._changed:
            self._changed.wait_for(lambda: self.filled > position or self._complete or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            return self.filled


class _Following(io.RawIOBase):
    """A blob read while it is being filled."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob, self._position = blob, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._blob.wait_beyond(self._position) - self._position)
        if count:
            self._blob.layer.pread_into(memoryview(buffer)[:count], self._position)
            self._position += count
        return count


def open_kept(layer: LayerAPI, offset: int = 0) -> BinaryIO:
    """A stream over an archive that the pool keeps."""
    raw = layer.open()
    raw.seek(offset)
    return cast(BinaryIO, io.BufferedReader(raw, PIECE_BYTES))


def copy(source: BinaryIO, write: Callable[[bytes], object], stopped: threading.Event) -> None:
    """Moves a stream to its end; gives up once ``stopped`` is set."""
    while data := source.read(PIECE_BYTES):
        if stopped.is_set():
            raise ImportFailed("given up")
        write(data)
