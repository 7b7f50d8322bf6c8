"""What dm-log-writes wrote to its log device: all writes to a disk, each before the flush that made sure of it, and marks in between.

Doing all up to any flush, and any of what comes between that and the next, gives a disk as a power cut may leave it. The format is in the kernel's
Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MAGIC = 0x6A736677736872
_VERSION = 1
_SUPER = struct.Struct("<QQQL")  # magic, version, entries, bytes of a sector
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, bytes of a mark's text
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8


@dataclass(frozen=True)
class Entry:
    """A write, a discard, or a mark. Offsets and lengths are bytes; ``data``: where in the log a write's bytes are.

    ``flush``: what is before it is sure to be on the disk; ``fua``: it is itself.
    """

    offset: int
    length: int
    data: int
    flush: bool
    fua: bool
    discard: bool
    mark: str | None


def entries(log: Path) -> list[Entry]:
    """All of them, in order."""
    found = []
    with log.open("rb") as file:
        magic, version, count, sector_bytes = _SUPER.unpack(file.read(_SUPER.size))
        assert (magic, version) == (_MAGIC, _VERSION), f"{log} is no log of writes"
        at = sector_bytes
        for _ in range(count):
            file.seek(at)
            sector, sectors, flags, text_bytes = _ENTRY.unpack(file.read(_ENTRY.size))
            mark = file.read(text_bytes).rstrip(b"\0").decode() if flags & _MARK else None
            at += sector_bytes
            kinds = (bool(flags & kind) for kind in (_FLUSH, _FUA, _DISCARD))
            found.append(Entry(sector * sector_bytes, sectors * sector_bytes, at, *kinds, mark))
            if not flags & _DISCARD:
                at += sectors * sector_bytes
    return found


def cut(entries: Sequence[Entry], place: int, rng: random.Random) -> tuple[int, list[Entry]]:
    """A power cut before the entry of that number: how many entries are all on the disk, and which of those after them are by chance."""
    flushed = max((number for number in range(place) if entries[number].flush), default=0)
    return flushed, [entry for entry in entries[flushed:place] if entry.fua or rng.random() < 0.5]


def replay(log: Path, part: Sequence[Entry], disk: Path) -> None:
    """Does a part of the log to a disk."""
    with log.open("rb") as source, disk.open("r+b") as target:
        for entry in part:
            source.seek(entry.data)
            target.seek(entry.offset)
            target.write(bytes(entry.length) if entry.discard else source.read(entry.length))
