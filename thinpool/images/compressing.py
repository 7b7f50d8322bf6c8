"""Compression of layer archives that come as plain tars.

What is only kept is compressed with zstd where that is installed: several times faster than gzip. What leaves the pool is gzip,
which every tool reads (image-spec, "Layer media types"); the same bytes give the same archive each time, for no time is in it.
"""

from __future__ import annotations

import zlib
from typing import Protocol

from .oci import LAYER_GZIP, LAYER_ZSTD

_GZIP = 31  # zlib's window bits for a gzip header, which has no time in it


class Compressor(Protocol):
    """Compresses a stream piece by piece."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def quick_compressor() -> tuple[str, Compressor]:
    """For keeping: the media type of what comes out, and the compressor."""
    try:
        import zstandard
    except ImportError:
        return LAYER_GZIP, zlib.compressobj(1, zlib.DEFLATED, _GZIP)
    return LAYER_ZSTD, zstandard.ZstdCompressor(level=1).compressobj()


def portable_compressor() -> tuple[str, Compressor]:
    """For sending: gzip."""
    return LAYER_GZIP, zlib.compressobj(6, zlib.DEFLATED, _GZIP)
