"""Records decoded and encoded without an engine: the seam to ``csrc/inspect.c``, and the small ones in Python (docs/FORMAT.md)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from .._core import ffi, lib
from ..engine import BLOCK_SIZE
from ..metadata import frame, unframe

_core, _ffi = lib, ffi
FANOUT, PAGE_VALUES, CHECKSUM_VALUES, LEVELS_MAX = 256, 1024, 128, 7
_NODE_BYTES_MAX = 64 << 10


def key_of(number: int) -> bytes:
    """The stored form of a key that is a number."""
    return number.to_bytes(8, "big")


class References:
    """How often each chunk of a range is named, as far as nodes were shown to :class:`NodeReader` with it."""

    def __init__(self, first: int, length: int) -> None:
        self.move(first, length)

    def move(self, first: int, length: int) -> None:
        """Begins again, with other chunks."""
        self._counts: Any = None
        self.pointer: Any = None  # the memory goes before more is taken
        self.first, self.length = first, length
        self._counts = _ffi.new("uint32_t[]", max(length, 1))
        self.pointer = _ffi.new("tp_counts *", (self._counts, first, length))

    def counts(self, page: int) -> list[int]:
        """The counts of a page of chunks."""
        return list(_ffi.unpack(self.page(page), PAGE_VALUES))

    def page(self, page: int) -> Any:
        """A pointer to the counts of a page of chunks, all of it within the range."""
        return self._counts + (page * PAGE_VALUES - self.first)


class NodeReader:
    """Decodes map nodes; holds the last one."""

    def __init__(self, chunk_size: int) -> None:
        self.blocks = max(chunk_size // BLOCK_SIZE, 1)
        self._info = _ffi.new("tp_node_info *")
        self._splits = _ffi.new("uint64_t[]", FANOUT * (2 + self.blocks))
        self._out = _ffi.new("uint8_t[]", _NODE_BYTES_MAX + FANOUT * self.blocks * 9)

    def read(self, node_id: int, value: bytes, references: References | None = None, *, splits: bool = False) -> bool:
        """Decodes a stored node, and adds what a leaf names to ``references``; false: it is damaged."""
        counts = references.pointer if references is not None else _ffi.NULL
        return bool(_core.tp_inspect_node(node_id, value, len(value), self.blocks, self._info, counts, self._splits if splits else _ffi.NULL) == 0)

    @property
    def level(self) -> int:
        return int(self._info.level)

    @property
    def references(self) -> int:
        """How many chunks the leaf names, by a split each once."""
        return int(self._info.references)

    @property
    def chunks_end(self) -> int:
        """The largest chunk number that the leaf names, and one."""
        return int(self._info.chunks_end)

    def entries(self) -> list[int]:
        """All 256: chunk number + 1 or a child's id; 0 for nothing or a split."""
        return list(_ffi.unpack(self._info.entry, FANOUT))

    def splits(self) -> list[tuple[int, int, list[int]]]:
        """(place, own, blocks) of each split, if they were asked for."""
        found, width = [], 2 + self.blocks
        for k in range(self._info.split_count):
            place, own, *blocks = _ffi.unpack(self._splits + k * width, width)
            found.append((place, own, blocks))
        return found

    def make(self, node_id: int, level: int, entries: Sequence[int], splits: Sequence[tuple[int, int, Sequence[int]]] = ()) -> bytes:
        """The stored form of a node."""
        info, length = self._info, _ffi.new("uint64_t *", len(self._out))
        info.level, info.split_count = level, len(splits)
        info.entry = list(entries)
        for k, (place, own, blocks) in enumerate(splits):
            _ffi.memmove(self._splits + k * (2 + self.blocks), array("Q", (place, own, *blocks)), (2 + self.blocks) * 8)
        rc = _core.tp_make_node(node_id, info, self.blocks, self._splits, self._out, length)
        assert rc == 0, rc
        return bytes(_ffi.buffer(self._out, length[0]))


def new_page() -> Any:
    """Room for a page's 1,024 values, all 0."""
    return _ffi.new("uint32_t[]", PAGE_VALUES)


def read_page(kind: int, key: int, value: bytes, into: Any) -> bool:
    """Decodes a page of counts, or the checksums of 128 chunks; false: it is damaged."""
    return bool(_core.tp_inspect_page(kind, key, value, len(value), into) == 0)


def make_page(kind: int, key: int, values: Any) -> bytes:
    """The stored form of a page; ``values``: a list, or a pointer."""
    out, length = _ffi.new("uint8_t[]", 10 * PAGE_VALUES), _ffi.new("uint64_t *", 10 * PAGE_VALUES)
    rc = _core.tp_make_page(kind, key, values, out, length)
    assert rc == 0, rc
    return bytes(_ffi.buffer(out, length[0]))


def compare(stored: Any, found: Any, *, chunks: bool) -> Any:
    """A page's values against the references found: a ``tp_comparison``."""
    out = _ffi.new("tp_comparison *")
    _core.tp_compare_counts(stored, found, chunks, out)
    return out


def stray_checksum(counts: Any, checksums: Any) -> int:
    """The first place in a page of chunks where there is a checksum and no count; -1: there is none."""
    return int(_core.tp_stray_checksum(counts, checksums))


def varints(kind: int, key: bytes, value: bytes) -> list[int]:
    """The numbers of a record that holds nothing else. Raises :class:`~thinpool.errors.DamagedError`."""
    found, number, shift = [], 0, 0
    for byte in unframe(kind, key, value):
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(number)
            number = shift = 0
    return found


def of_varints(kind: int, key: bytes, numbers: Iterable[int]) -> bytes:
    """The stored form of a record of numbers."""
    body = bytearray()
    for number in numbers:
        while number >= 0x80:
            body.append(number & 0x7F | 0x80)
            number >>= 7
        body.append(number)
    return frame(kind, key, bytes(body))
