"""Streams decompressed, whatever they are compressed with: told by how they begin."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, cast

from ..errors import ImportFailed

_PIECE_BYTES = 1 << 20
_GZIP = 31  # zlib's window bits: a gzip header
_HEAD_BYTES = 6


class Readable(Protocol):
    """What can be read to its end."""

    def read(self, size: int = -1, /) -> bytes: ...


class _Decompressor(Protocol):
    """As of bz2 and lzma: one compressed stream."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd() -> _Decompressor:
    try:
        import zstandard
    except ImportError:
        raise ImportFailed("it is compressed with zstd: pip install 'thinpool[zstd]' to read it") from None
    return cast(_Decompressor, zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj())


_FORMS: list[tuple[bytes, str, Callable[[], _Decompressor]]] = [
    (b"\x1f\x8b", "gzip", lambda: zlib.decompressobj(_GZIP)),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"\xfd7zXZ\0", "xz", lzma.LZMADecompressor),
    (b"BZh", "bzip2", bz2.BZ2Decompressor),
]


def form_of(head: bytes) -> str | None:
    """What a stream that begins so is compressed with; ``None``: nothing that is known here."""
    return next((name for magic, name, _ in _FORMS if head.startswith(magic)), None)


def decompressed(stream: Readable) -> BinaryIO:
    """The plain stream (plain, gzip, zstd, xz or bzip2; several one after another are one). Its reads raise ImportFailed for damage.

    Reads large pieces, so that the work is done outside Python's lock.
    """
    head = stream.read(_PIECE_BYTES)
    while 0 < len(head) < _HEAD_BYTES and (more := stream.read(_PIECE_BYTES)):
        head += more
    form = next(((name, make) for magic, name, make in _FORMS if head.startswith(magic)), None)
    raw = _Plain(stream, head) if form is None else _Decompressed(stream, head, *form)
    return cast(BinaryIO, io.BufferedReader(raw, _PIECE_BYTES))


class _Plain(io.RawIOBase):
    """A stream of which the begin was read already."""

    def __init__(self, stream: Readable, head: bytes) -> None:
        super().__init__()
        self._stream, self._pending = stream, memoryview(head)

    def readable(self) -> bool:
        return True

    def _next(self) -> bytes:
        return self._stream.read(_PIECE_BYTES)

    def readinto(self, buffer: Any) -> int:
        if not self._pending:
            self._pending = memoryview(self._next())
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count


class _Decompressed(_Plain):
    """One or more compressed streams."""

    def __init__(self, stream: Readable, head: bytes, name: str, make: Callable[[], _Decompressor]) -> None:
        super().__init__(stream, b"")
        self._input, self._name, self._make = head, name, make
        self._decompressor: _Decompressor | None = make()

    def _next(self) -> bytes:
        while True:
            data, self._input = self._input or self._stream.read(_PIECE_BYTES), b""
            if not data:
                if self._decompressor is not None:
                    raise ImportFailed(f"its {self._name} stream is cut short")
                return b""
            if self._decompressor is None:
                if not data.strip(b"\0"):  # padding behind the last one
                    continue
                self._decompressor = self._make()
            try:
                plain = self._decompressor.decompress(data)
            except ImportFailed:
                raise
            except Exception as error:  # each library has its own
                raise ImportFailed(f"its {self._name} stream is damaged: {error}") from error
            if self._decompressor.eof:
                self._input, self._decompressor = self._decompressor.unused_data, None
            if plain:
                return plain
