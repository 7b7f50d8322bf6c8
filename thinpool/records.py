"""Encoded records as the core hands them over (csrc/thinpool.h, ``tp_encode``), and what it asks of whoever keeps them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

Record = tuple[int, bytes, bytes | None]
"""(kind, key, value); value ``None``: the record is deleted."""
_HEAD = struct.Struct("<BBHI8s")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The engine's figures: sizes in bytes, counters since it was opened."""

    chunk_size: int
    capacity_chunks: int
    allocated_chunks: int
    dirty_chunks: int
    pending_chunks: int
    pinned_chunks: int
    data_bytes: int
    reclaim_nodes: int
    txn: int
    durable_txn: int
    dirty: int
    failed: int
    failed_errno: int
    refused: int
    waiting_writers: int
    cached_bytes: int
    splits: int
    in_place: int
    first_writes: int
    window_waits: int
    fetches: int


class Store(Protocol):
    """What the engine asks of whoever keeps its records."""

    def fetch(self, kind: int, key: int) -> bytes | memoryview | None:
        """The committed value of a record; ``None``: there is none. Called with locks held."""

    def commit(self) -> None:
        """Run one commit, from freeze to release."""

    def extend_window(self) -> None:
        """Plan, store and activate more allocation window."""

    def layer_name(self, layer_id: int) -> str:
        """A name for messages."""


def parse_records(data: bytes) -> Iterator[Record]:
    """Those that lie back to back in ``data``."""
    position = 0
    while position < len(data):
        kind, deleted, _, length, key = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        yield kind, key, None if deleted else data[position : position + length]
        position += length
