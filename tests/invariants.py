"""An independent reader of a pool's records, written from docs/FORMAT.md, that checks the invariants I1, I2, I3, I8 and I9.

It shares no code with the engine: what both agree on is what the format says. Only the CRC of a chunk's bytes is the engine's, which is quick,
and the same as here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import thinpool.engine

NODE, CHUNK_PAGE, NODE_PAGE, SUMMARY, MAP, STATE, LAYER = range(1, 8)
CHECKSUM = 11
PAGE = 1024
CHECKSUMS = 128
FANOUT = 256

Records = Callable[[int], Iterable[tuple[bytes, bytes]]]
"""The committed (key, value) pairs of a kind."""
Data = Callable[[int, int], bytes]
"""Bytes of the data file: (offset, length)."""


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, from RFC 3720 appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC_TABLE = _table()


class Reader:
    """A cursor over a record's body."""

    def __init__(self, kind: int, key: bytes, value: bytes) -> None:
        stored = int.from_bytes(value[:4], "little")
        assert stored == crc32c(bytes([kind]) + key + value[4:]), f"record {kind}/{key.hex()}: checksum"
        self.data, self.position = value, 4

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.position]
            self.position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def array(self, count: int) -> list[int]:
        form = self.data[self.position]
        self.position += 1
        values: list[int] = []
        if form:
            base = self.varint()
            for _ in range(count):
                code = int.from_bytes(self.data[self.position : self.position + form], "little")
                self.position += form
                values.append(code and base + code - 1)
            return values
        last = 0
        while len(values) < count:
            head = self.varint()
            length, kind = head >> 2, head & 3
            if kind == 0:
                values += [0] * length
                continue
            first = last + self.zigzag()
            run = range(first, first + length) if kind == 2 else [first] * length
            values += run
            last = run[-1]
        assert len(values) == count
        return values


Node = tuple[int, list[int], dict[int, list[int]]]
"""Level, entries, and what split ones name per block."""


# Most records are what they were when a test last looked.
@lru_cache(maxsize=1 << 12)
def _node(key: bytes, value: bytes, blocks: int) -> Node:
    reader = Reader(NODE, key, value)
    level, entries, splits = reader.varint(), reader.array(FANOUT), {}
    if level == 0:
        at = 0
        for _ in range(reader.varint()):
            at += reader.varint()
            own = reader.varint()
            splits[at] = reader.array(blocks)
            assert own == 0 or own in splits[at], "a split's own chunk is one it names"
            assert entries[at] == 0
    assert reader.position == len(value)
    return level, entries, splits


@lru_cache(maxsize=1 << 10)
def _counts(kind: int, key: bytes, value: bytes) -> dict[int, int]:
    """Those of a page that are not 0."""
    first = int.from_bytes(key, "big") * PAGE
    return {first + i: count for i, count in enumerate(Reader(kind, key, value).array(PAGE)) if count}


@lru_cache(maxsize=1 << 10)
def _checksums(key: bytes, value: bytes) -> dict[int, int]:
    """By chunk, of those that have one."""
    first = int.from_bytes(key, "big") * CHECKSUMS
    return {first + i: checksum for i, checksum in enumerate(Reader(CHECKSUM, key, value).array(CHECKSUMS)) if checksum}


@dataclass
class Stored:
    """All records of a pool, decoded."""

    blocks: int
    nodes: dict[int, Node] = field(default_factory=dict)
    chunks: dict[int, int] = field(default_factory=dict)
    node_counts: dict[int, int] = field(default_factory=dict)
    summaries: dict[int, int] = field(default_factory=dict)
    maps: dict[int, dict[str, int]] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)
    queue: list[int] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    checksums: dict[int, int] = field(default_factory=dict)  # by chunk

    def entry_chunks(self, node: int) -> list[int]:
        """What a leaf names, with repetition over entries, each chunk once per entry."""
        _, entries, splits = self.nodes[node]
        named = [entry - 1 for entry in entries if entry]
        for blocks in splits.values():
            named += {block - 1 for block in blocks if block}
        return named


def load(records: Records, chunk_size: int) -> Stored:
    """Decodes everything."""
    stored = Stored(blocks=chunk_size // 4096)
    for key, value in records(NODE):
        stored.nodes[int.from_bytes(key, "big")] = _node(key, value, stored.blocks)
    for kind, into in ((CHUNK_PAGE, stored.chunks), (NODE_PAGE, stored.node_counts), (SUMMARY, stored.summaries)):
        for key, value in records(kind):
            into.update(_counts(kind, key, value))
    for key, value in records(CHECKSUM):
        stored.checksums.update(_checksums(key, value))
    for key, value in records(MAP):
        reader = Reader(MAP, key, value)
        stored.maps[int.from_bytes(key, "big")] = {name: reader.varint() for name in ("root", "height", "size", "mapped_refs", "sealed")}
    for key, value in records(STATE):
        reader, number = Reader(STATE, key, value), int.from_bytes(key, "big")
        if number == 0:
            stored.state = {name: reader.varint() for name in ("next_node", "pages", "allocated", "dirty")}
        elif number == 1:
            stored.queue = [reader.varint() for _ in range(reader.varint())]
    for key, value in records(LAYER):
        Reader(LAYER, key, value)
        stored.layers.add(int.from_bytes(key, "big"))
    return stored


def data_of(path: Path) -> Data:
    """The data file of the pool in that directory."""

    def read(offset: int, length: int) -> bytes:
        with open(path / "data", "rb") as file:
            file.seek(offset)
            return file.read(length)

    return read


def check(records: Records, chunk_size: int, data: Data | None = None) -> Stored:
    """Raises AssertionError, saying which invariant is broken where; with ``data``, also where a chunk is not what its checksum says."""
    stored = load(records, chunk_size)
    assert stored.layers == set(stored.maps), "I8: names and maps are of the same layers"
    chunk_counts: Counter[int] = Counter()
    node_counts: Counter[int] = Counter(stored.queue)
    node_counts.update(layer["root"] for layer in stored.maps.values() if layer["root"])
    for node, (level, entries, _) in stored.nodes.items():
        if level == 0:
            chunk_counts.update(stored.entry_chunks(node))
        else:
            node_counts.update(entry for entry in entries if entry)
    assert dict(node_counts) == stored.node_counts, f"I2: {_differences(node_counts, stored.node_counts)}"
    assert set(node_counts) == set(stored.nodes), "I2: nodes without a record, or records without an owner"
    allocated = {chunk: value - 1 for chunk, value in stored.chunks.items() if value > 1}
    assert dict(chunk_counts) == allocated, f"I1, I3: {_differences(chunk_counts, allocated)}"
    assert stored.checksums.keys() <= allocated.keys(), f"I9: free chunks have checksums: {sorted(stored.checksums.keys() - allocated.keys())[:5]}"
    if data is not None:
        for chunk, checksum in stored.checksums.items():
            found = thinpool.engine.crc32c(data(chunk * chunk_size, chunk_size)) or 1
            assert found == checksum, f"I9: chunk {chunk} is not what its checksum says"
    if stored.state:
        _check_totals(stored)
    for layer_id, layer in stored.maps.items():
        assert (layer["root"] == 0) == (layer["height"] == 0)
        if layer["root"]:
            assert stored.nodes[layer["root"]][0] == layer["height"] - 1
        named = [chunk for leaf in leaves(stored, layer["root"]) for chunk in stored.entry_chunks(leaf)]
        assert len(named) == layer["mapped_refs"], f"layer {layer_id}: names {len(named)} chunks, counted {layer['mapped_refs']}"
    return stored


def _check_totals(stored: Stored) -> None:
    state = stored.state
    used = Counter(chunk // PAGE for chunk, value in stored.chunks.items() if value > 1)
    dirty = Counter(chunk // PAGE for chunk, value in stored.chunks.items() if value == 1)
    assert state["allocated"] == used.total(), "I3: chunks allocated"
    assert state["dirty"] == dirty.total(), "I3: chunks dirty"
    assert all(node < state["next_node"] for node in stored.nodes), "node ids are never used twice"
    for page in range(state["pages"]):
        summary = PAGE - used[page] - dirty[page] + (dirty[page] << 16)
        assert stored.summaries.get(page, 0) == summary, f"summary of page {page}: {stored.summaries.get(page, 0):#x}, not {summary:#x}"


def leaves(stored: Stored, root: int) -> Iterable[int]:
    """The leaves below a node, one by one."""
    if not root:
        return
    level, entries, _ = stored.nodes[root]
    if level == 0:
        yield root
        return
    for entry in entries:
        yield from leaves(stored, entry)


def exclusive_chunks(stored: Stored, *layer_ids: int) -> int:
    """How many chunks deleting the layers would free: by counting without them."""

    def counted(*skipped: int) -> set[int]:
        roots = [layer["root"] for number, layer in stored.maps.items() if number not in skipped] + stored.queue
        seen: set[int] = set()
        chunks: set[int] = set()
        while roots:
            node = roots.pop()
            if not node or node in seen:
                continue
            seen.add(node)
            level, entries, _ = stored.nodes[node]
            if level == 0:
                chunks.update(stored.entry_chunks(node))
            else:
                roots += entries
        return chunks

    return len(counted()) - len(counted(*layer_ids))


def _differences(counted: Counter[int], stored: dict[int, int]) -> str:
    wrong = [(key, counted.get(key, 0), stored.get(key, 0)) for key in sorted(set(counted) | set(stored)) if counted.get(key, 0) != stored.get(key, 0)]
    return f"{len(wrong)} counts differ; (number, references, stored count): {wrong[:5]}"
