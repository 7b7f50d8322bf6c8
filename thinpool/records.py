"""Encoded records as the core hands them over (csrc/thinpool.h, ``tp_encode``)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

Record = tuple[int, bytes, bytes | None]
"""(kind, key, value); value ``None``: the record is deleted."""
_HEAD = struct.Struct("<BBHI8s")


def parse_records(data: bytes) -> Iterator[Record]:
    """Those that lie back to back in ``data``."""
    position = 0
    while position < len(data):
        kind, deleted, _, length, key = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        yield kind, key, None if deleted else data[position : position + length]
        position += length
