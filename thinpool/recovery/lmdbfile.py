"""An LMDB file read page by page, without LMDB: by whoever cannot trust it.

LMDB maps its file and follows what it finds there: damage can crash the process, or go unseen. This reader checks each page
before it uses it, reads by ``pread``, tells of what makes no sense instead of stopping, and goes on with the rest. It also
knows which pages are in use, free, or neither, so that what a damaged branch page hid can be found.

The layout is that of LMDB 0.9 on a little-endian 64-bit machine (its ``mdb.c``: ``MDB_page``, ``MDB_node``, ``MDB_db``, ``MDB_meta``):

- page: number (8 bytes), pad (2), flags (2); then ``lower`` and ``upper`` (2 each), or how many pages an overflow takes (4)
- behind it, up to ``lower``, the offsets of its nodes (2 each), in the order of their keys
- node: low and high half of the data's size (2 each), flags (2), the key's size (2), the key, the data; in a branch page the first
  three are a page's number
- database: pad (4), flags (2), depth (2), branch, leaf and overflow pages, entries, root (8 each)
- meta pages 0 and 1: magic, version (4 each), address, map size (8 each), two databases (free pages, names), last page, transaction
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META, _DIRTY = 1, 2, 4, 8, 0x10
_BIGDATA, _SUBDATA, _DUPDATA = 1, 2, 4
_HEAD = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_DATABASE = struct.Struct("<IHHQQQQQ")
_META_HEAD = struct.Struct("<IIQQ")
_META_TAIL = struct.Struct("<QQ")
_HEAD_BYTES, _META_BYTES, _DEPTH_MAX = 16, 16 + 24 + 2 * 48 + 16, 32
_NO_PAGE = 2**64 - 1
UNUSED, USED, FREE = 0, 1, 2

OnDamage = Callable[[str], None]
"""Called with a sentence about each thing that makes no sense."""


@dataclass(frozen=True, slots=True)
class Database:
    """A B-tree: where its root is, and what it should hold."""

    depth: int
    pages: int
    entries: int
    root: int


@dataclass(frozen=True, slots=True)
class Meta:
    """A meta page: one committed state of the file."""

    page_size: int
    free: Database
    main: Database
    last_page: int
    txn: int


def _database(data: bytes, offset: int = 0) -> tuple[int, Database]:
    pad, _flags, depth, branch, leaf, overflow, entries, root = _DATABASE.unpack_from(data, offset)
    return pad, Database(depth, branch + leaf + overflow, entries, root)


class LmdbFile:
    """One committed state of an LMDB file. A context manager."""

    def __init__(self, path: Path, on_damage: OnDamage, txn: int | None = None, meta: Meta | None = None) -> None:
        """Of ``path``, the newest state, that of transaction ``txn``, or one that was read before. Raises OSError; LookupError where there is no such state."""
        self.path = path
        self.on_damage = on_damage
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.meta = meta or self._choose(txn)
        except BaseException:
            self._file.close()
            raise
        self.page_size = self.meta.page_size
        self.use = bytearray(self.meta.last_page + 1)  # UNUSED, USED or FREE, by page
        self.use[0:2] = bytes([USED, USED])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, length: int, offset: int) -> bytes:
        """What the file has there: less where it ends, and nothing where the disk cannot read it."""
        try:
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            self.on_damage(f"the metadata file cannot be read at {offset}: {error.strerror}")
            return b""

    # --- meta pages ---

    def _choose(self, txn: int | None) -> Meta:
        metas = [self._read_meta(0)]
        sizes = [metas[0].page_size] if metas[0] else [4096 << k for k in range(5)]
        metas.append(next(filter(None, (self._read_meta(1, size) for size in sizes)), None))
        for number, meta in enumerate(metas):
            if meta is None:
                self.on_damage(f"meta page {number} of the metadata file is damaged")
            elif meta.txn % 2 != number and meta.txn > 1:
                self.on_damage(f"meta page {number} of the metadata file holds transaction {meta.txn}, which belongs on the other one")
        known = [meta for meta in metas if meta is not None and txn in (None, meta.txn)]
        if not known:
            raise LookupError("no meta page of the metadata file can be read")
        txns = [meta.txn for meta in metas if meta is not None]
        if len(txns) == 2 and abs(txns[0] - txns[1]) > 1:
            self.on_damage(f"the meta pages of the metadata file are of transactions {txns[0]} and {txns[1]}, which do not follow one another")
        return max(known, key=lambda meta: meta.txn)

    def _read_meta(self, number: int, page_size: int = 0) -> Meta | None:
        data = self._read(_META_BYTES, number * page_size)
        if len(data) < _META_BYTES:
            return None
        page, _, flags, _, _ = _HEAD.unpack_from(data)
        magic, version, _, _ = _META_HEAD.unpack_from(data, _HEAD_BYTES)
        if page != number or flags & ~_DIRTY != _META or (magic, version) != (_MAGIC, _VERSION):
            return None
        found_size, free = _database(data, _HEAD_BYTES + 24)
        _, main = _database(data, _HEAD_BYTES + 72)
        last_page, txn = _META_TAIL.unpack_from(data, _HEAD_BYTES + 120)
        sound = found_size in (page_size or found_size,) and 512 <= found_size <= 65536 and found_size & (found_size - 1) == 0
        if not sound or last_page > self.size // found_size + (1 << 32):
            return None
        return Meta(found_size, free, main, last_page, txn)

    # --- pages ---

    def _page(self, number: int, flags: int, whose: str) -> bytes | None:
        """A page that a tree names, if it is what it must be."""
        if not 1 < number <= self.meta.last_page:
            self.on_damage(f"{whose}: names page {number}, which is not there")
            return None
        data = self._read(self.page_size, number * self.page_size)
        if len(data) < self.page_size:
            self.on_damage(f"{whose}: the metadata file has no page {number}")
            return None
        stored, _, found, lower, upper = _HEAD.unpack_from(data)
        if stored != number or found & ~_DIRTY != flags or (flags != _OVERFLOW and not _HEAD_BYTES <= lower <= upper <= self.page_size):
            self.on_damage(f"{whose}: page {number} of the metadata file is damaged")
            return None
        return data if self._take(number, 1, whose) else None

    def _take(self, number: int, count: int, whose: str) -> bool:
        """Marks pages as used by a tree; false where they are already."""
        if number + count > len(self.use) or any(self.use[number : number + count]):
            self.on_damage(f"{whose}: page {number} of the metadata file belongs to something else too")
            return False
        self.use[number : number + count] = bytes([USED]) * count
        return True

    def _nodes(self, number: int, data: bytes, whose: str) -> Iterator[tuple[int, int, int, int]]:
        """(low, high, flags, offset of the key's size) of a page's nodes."""
        lower, upper = _HEAD.unpack_from(data)[3:]
        for at in struct.unpack_from(f"<{(lower - _HEAD_BYTES) // 2}H", data, _HEAD_BYTES):
            if not upper <= at <= self.page_size - 8:
                self.on_damage(f"{whose}: a node of page {number} of the metadata file is out of place")
                continue
            low, high, flags, key_size = _NODE.unpack_from(data, at)
            if at + 8 + key_size > self.page_size:
                self.on_damage(f"{whose}: a node of page {number} of the metadata file is out of place")
                continue
            yield low, high, flags, at

    def _overflow(self, number: int, size: int, whose: str) -> bytes | None:
        """A value that does not fit a leaf page."""
        page = self._page(number, _OVERFLOW, whose)
        if page is None:
            return None
        count = (_HEAD_BYTES + size + self.page_size - 1) // self.page_size
        (stored,) = struct.unpack_from("<I", page, 12)
        if stored < count or (count > 1 and not self._take(number + 1, stored - 1, whose)):
            self.on_damage(f"{whose}: page {number} of the metadata file is damaged")
            return None
        data = self._read(size, number * self.page_size + _HEAD_BYTES)
        return data if len(data) == size else None

    def _leaf_items(self, number: int, data: bytes, whose: str) -> Iterator[tuple[bytes, bytes, int]]:
        """(key, value, flags) of a leaf page."""
        for low, high, flags, at in self._nodes(number, data, whose):
            (key_size,) = struct.unpack_from("<H", data, at + 6)
            begin, size = at + 8 + key_size, low | high << 16
            key = data[at + 8 : begin]
            if flags & _BIGDATA:
                if begin + 8 > self.page_size:
                    self.on_damage(f"{whose}: a node of page {number} of the metadata file is out of place")
                    continue
                value = self._overflow(int.from_bytes(data[begin : begin + 8], "little"), size, whose)
            else:
                value = data[begin : begin + size] if begin + size <= self.page_size else None
                if value is None:
                    self.on_damage(f"{whose}: a node of page {number} of the metadata file is out of place")
            if value is not None:
                yield key, value, flags

    # --- trees ---

    def _walk(self, database: Database, whose: str) -> Iterator[tuple[bytes, bytes, int]]:
        """All items of a tree in the order of keys, as far as they can be reached."""
        if database.root == _NO_PAGE:
            return
        if not 0 < database.depth <= _DEPTH_MAX:
            self.on_damage(f"{whose}: its depth of {database.depth} makes no sense")
            return
        stack = [(database.root, database.depth)]
        while stack:
            number, depth = stack.pop()
            data = self._page(number, _LEAF if depth == 1 else _BRANCH, whose)
            if data is None:
                continue
            if depth == 1:
                yield from self._leaf_items(number, data, whose)
                continue
            children = [low | high << 16 | flags << 32 for low, high, flags, _ in self._nodes(number, data, whose)]
            stack.extend((child, depth - 1) for child in reversed(children))

    def items(self, database: Database, whose: str) -> Iterator[tuple[bytes, bytes]]:
        """All (key, value) of a database in the order of keys; tells of keys that are out of order and of entries that are missing."""
        previous, count, pages = b"", 0, self.use.count(USED)
        for key, value, _ in self._walk(database, whose):
            if count and key <= previous:
                self.on_damage(f"{whose}: key {key.hex()} is out of order")
            previous, count = key, count + 1
            yield key, value
        pages = self.use.count(USED) - pages
        if count != database.entries or pages != database.pages:
            self.on_damage(f"{whose}: {count} records in {pages} pages, where {database.entries} in {database.pages} should be")

    def databases(self) -> dict[bytes, Database]:
        """The named databases."""
        found = {}
        for name, value, flags in self._walk(self.meta.main, "the list of databases"):
            if flags & _SUBDATA and len(value) == _DATABASE.size:
                found[name] = _database(value)[1]
            else:
                self.on_damage(f"the list of databases: {name!r} is none")
        if len(found) != self.meta.main.entries:
            self.on_damage(f"the list of databases: {len(found)}, where {self.meta.main.entries} should be")
        return found

    def mark_free(self) -> None:
        """Walks the list of free pages; tells of pages that are both free and used. After everything else was walked."""
        for key, value, _ in self._walk(self.meta.free, "the list of free pages"):
            count = int.from_bytes(value[:8], "little")
            if len(key) != 8 or len(value) % 8 or count > len(value) // 8 - 1:
                self.on_damage("the list of free pages: an entry makes no sense")
                continue
            for page in struct.unpack_from(f"<{count}Q", value, 8):
                if page >= len(self.use) or self.use[page] != UNUSED:
                    self.on_damage(f"the list of free pages: page {page} is not free")
                else:
                    self.use[page] = FREE

    def stray_items(self) -> Iterator[tuple[bytes, bytes]]:
        """The records of leaf pages that no tree leads to and that are not free: what a damaged page has hidden. After :meth:`mark_free`."""
        return self._leaves(number for number in range(2, len(self.use)) if self.use[number] == UNUSED)

    def leaf_items(self) -> Iterator[tuple[bytes, bytes]]:
        """The records of all leaf pages, also of free ones: whatever was stored once and not yet overwritten."""
        return self._leaves(range(2, len(self.use)))

    def _leaves(self, numbers: Iterable[int]) -> Iterator[tuple[bytes, bytes]]:
        with LmdbFile(self.path, lambda _: None, meta=self.meta) as again:
            for number in numbers:
                again.use = bytearray(len(self.use))  # versions of a record may share a value behind its leaf
                data = again._page(number, _LEAF, "")
                if data is not None:
                    yield from ((key, value) for key, value, _ in again._leaf_items(number, data, ""))
