"""Repairs a pool: counts and space are made anew from the maps, and of damaged maps what can be read is kept.

It is done in a new metadata environment. That is checked, and takes the place of the old one, at once; the old one is kept beside it.

What becomes of damage:

- A part of a map that cannot be read reads as zeros from then on. It is lost; the report says so, and the layer's label ``thinpool.lost``.
- An image's layer, or an archive, that lost anything is renamed to ``damaged/...``, so that nobody takes it for the whole one.
- A part of a map that is whole but that nothing leads to any more becomes a layer ``lost-N`` of its own: where it belonged is not known.
- A layer whose map record is lost gets the one such part there is, if there is one and no other such layer; else its name is dropped.
- A layer whose name is lost gets the one that its children know, or is ``lost-name-N``.
- What was deleted, and waited to be reclaimed, is free.
"""

from __future__ import annotations

import os
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..api import Progress, Range
from ..backups import held_backups
from ..catalog import LayerRecord
from ..engine import CHECKSUM, CHUNK_PAGE, MAP, NODE, NODE_PAGE, STATE, SUMMARY
from ..errors import DamagedError, PoolBusy
from ..metadata import DOCUMENT, FORMAT_VERSION, KNOWN_READ_COMPATIBLE, Metadata, unframe
from ..poolfiles import PoolFiles
from ..records import Record
from .check import MEMORY_BYTES, check, check_state
from .checksums import Checksums
from .held import Sources
from .nodes import LayerMap, NodeTable, lost_ranges
from .records import CHECKSUM_VALUES, FANOUT, PAGE_VALUES, NodeReader, References, key_of, make_page, new_page, of_varints, varints
from .report import Report, joined
from .stored import StoredState

LOST_LABEL = "thinpool.lost"
_BATCH = 4096
_LABEL_RANGES_MAX = 20
_NAME_MAX = 255


@dataclass
class Repair:
    """What was done. ``kept``: where the old metadata is; empty: there was nothing to repair."""

    before: Report
    kept: str = ""
    lost: list[Range] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def repair(path: Path, *, leaks_only: bool = False, chunk_size: int = 0, memory_bytes: int = MEMORY_BYTES, progress: Progress | None = None) -> Repair:
    """Repairs the pool in ``path``, which nobody else has open for writing.

    ``leaks_only`` refuses where there is more to repair than leaks. ``chunk_size`` in bytes: for a pool that has lost even that. Raises
    PoolNotFound, PoolBusy, OutOfSpace; DamagedError where nothing can be done, and the pool is then as it was.
    """
    files = PoolFiles(path)
    files.require_pool()
    with ExitStack() as undo:
        undo.callback(files.close)
        take_alone(files)
        done = Repair(check(path, memory_bytes=memory_bytes, progress=progress))
        if not done.before.corruptions and not done.before.leaks:
            return done
        if leaks_only and done.before.corruptions:
            raise DamagedError(f"the pool {path} has more than leaks: repair it without --leaks")
        make_anew(files, files.meta, done, chunk_size, memory_bytes)
    return done


def restore_metadata(path: Path, backup: Path, *, memory_bytes: int = MEMORY_BYTES) -> Repair:
    """Puts a backup's layers and maps (see :mod:`.backups`) in the place of the pool's metadata, which is kept; counts and space are made anew.

    What was freed since the backup was made may hold something else by now: only digests tell. A held one brings back all that it holds as it was, and nothing
    else. Raises as :func:`repair` does; BackupHeld where a held backup would not be whole any more.
    """
    files = PoolFiles(path)
    with ExitStack() as undo:
        undo.callback(files.close)
        take_alone(files)
        done = Repair(Report("full"))
        with StoredState(backup, done.before.corrupt) as state:
            check_state(state, files, done.before, memory_bytes=memory_bytes)
        make_anew(files, backup, done, memory_bytes=memory_bytes)
    return done


def take_alone(files: PoolFiles) -> None:
    """The lock, for who puts other metadata in place. Raises PoolBusy."""
    try:
        files.lock()
    except PoolBusy as busy:
        raise PoolBusy(f"{busy}: its metadata is repaired or replaced only while nobody has it open, so end that process first", busy.pid) from None


def make_anew(files: PoolFiles, source: Path, done: Repair, chunk_size: int = 0, memory_bytes: int = MEMORY_BYTES) -> None:
    """A new environment from what can be read of ``source``, and of what held backups hold, checked and put in place."""
    files.open_data(read_only=False)
    new = files.new_meta()
    with Sources(source, held_backups(files.path)) as sources:
        if source != files.meta:
            sources.require_holds()
        _Repair(sources, files, done, chunk_size, memory_bytes).make(new)
    after = Report("full")
    with StoredState(new, after.corrupt) as state:
        check_state(state, files, after, memory_bytes=memory_bytes)
    if after.corruptions or after.leaks:
        raise DamagedError(f"the new metadata of {files.path} is not whole ({after.problems[0].message}): nothing was changed")
    done.kept = str(files.replace_meta(new))


class _Repair:
    """One repair under way."""

    def __init__(self, sources: Sources, files: PoolFiles, done: Repair, chunk_size: int, memory_bytes: int) -> None:
        self._sources, self._files, self._done = sources, files, done
        salvage = self._salvage = sources.salvage
        self._pool = salvage.pool_record() or _pool_record(chunk_size, files.path)
        self._chunk_size: int = self._pool["chunk_size"]
        self._memory_chunks = max(memory_bytes // 4 // PAGE_VALUES, 1) * PAGE_VALUES
        self._reader = NodeReader(self._chunk_size)
        self._counters = salvage.counters()
        self._pages = self._counters[1] if len(self._counters) > 1 else 0
        self._data_chunks = files.data.stat().st_size // self._chunk_size
        self._cut_leaves = array("Q")  # ids of leaves that name chunks behind the end of the data file

    def make(self, new: Path) -> None:
        """Fills the new environment, and brings the data file to its length."""
        self._read()
        self._settle_layers()
        store = Metadata(new, create=True)
        try:
            store.put_pool(self._pool)
            batch: list[Record] = []
            for record in self._records():
                batch.append(record)
                if len(batch) == _BATCH:
                    store.commit(batch, {}, {}, {})
                    batch = []
            documents = {key.decode(): unframe(DOCUMENT, key, value) for key, value in self._salvage.items(DOCUMENT) if not key.startswith(b"digest/")}
            fingerprints = {key: int.from_bytes(value[4:], "little") for key, value in self._salvage.fingerprints()}
            store.commit(batch, {number: record.as_json() for number, record in self._layers.items()}, fingerprints, documents)
        finally:
            store.close()
        size = self._pages * PAGE_VALUES * self._chunk_size
        if self._files.data.stat().st_size < size:
            os.ftruncate(self._files.data_fd, size)
            os.fsync(self._files.data_fd)

    # --- what there is ---

    def _read(self) -> None:
        self._maps = {}
        for number, value in self._sources.numbered(MAP):
            try:
                self._maps[number] = LayerMap(*varints(MAP, key_of(number), value))
            except TypeError:
                continue
        fields = LayerRecord.__slots__
        self._layers = {number: LayerRecord(**{name: record[name] for name in fields if name in record}) for number, record in self._sources.layers().items()}
        if self._done.before.corruptions:  # which chunks have lost theirs is not known: all are looked at again
            for record in self._layers.values():
                record.checksums = False
        self._table, sound = NodeTable(), True
        for node_id, value in self._sources.numbered(NODE):
            sound &= self._table.add(node_id, value, self._reader, None)
            if self._reader.level == 0 and self._reader.chunks_end > self._data_chunks:
                self._cut_leaves.append(node_id)
        missing: list[int] = []
        self._table.count_references(lambda _, child: missing.append(child))
        self._damaged = bool(missing) or bool(self._maps.keys() ^ self._layers.keys()) or any(self._is_lost(layer) for layer in self._maps.values())
        self._pages = max(self._pages, -(-min(self._table.chunks_end, self._data_chunks) // PAGE_VALUES), self._data_chunks // PAGE_VALUES)

    def _is_lost(self, layer: LayerMap) -> bool:
        root = self._table.find(layer.root)
        return layer.root != 0 and (root < 0 or self._table.levels[root] != layer.height - 1)

    # --- layers ---

    def _settle_layers(self) -> None:
        """Decides on maps and names, and on what is lost."""
        for number in self._maps.keys() - self._layers.keys():
            told = [child.origin for child in self._layers.values() if child.parent == number and child.origin]
            self._layers[number] = LayerRecord(self._free_name(told[0] if told else f"lost-name-{number}"), None, None, time.time())
            self._done.found.append(self._layers[number].name)
        names = {number: record.name for number, record in self._layers.items()}
        self._done.lost = list(joined(lost_ranges(self._table, self._maps, names, self._chunk_size)))
        self._done.lost += joined(self._cut_ranges(names))
        for node_id, value in self._values_of(self._cut_leaves):
            place = self._table.find(node_id)
            self._reader.read(node_id, self._mended(node_id, place, value, cut=True))
            self._table.references[place] = self._reader.references
        self._table.sum_references()
        for number, layer in self._maps.items():
            if self._is_lost(layer):
                self._maps[number] = LayerMap(0, 0, layer.size, 0, layer.sealed)
        self._live = self._below(self._maps)
        self._adopt_orphans()
        for number in self._layers.keys() - self._maps.keys():
            record = self._layers.pop(number)
            self._done.dropped.append(record.name)
        for record in self._layers.values():
            if record.parent is not None and record.parent not in self._layers:
                record.parent = None
        self._mark_losers()

    def _below(self, layers: Iterable[int]) -> bytearray:
        """The nodes that the maps of these layers lead to, by place."""
        found = bytearray(len(self._table.ids))
        for number in layers:
            if root := self._maps[number].root:
                self._table.reach(self._table.find(root), found)
        return found

    def _cut_ranges(self, names: dict[int, str]) -> Iterator[Range]:
        """What lay behind the end of the data file."""
        cut: dict[int, list[int]] = {}
        for node_id, value in self._values_of(self._cut_leaves):
            self._reader.read(node_id, value, splits=True)
            positions = [place for place, entry in enumerate(self._reader.entries()) if entry > self._data_chunks]
            positions += [place for place, _, blocks in self._reader.splits() if max(blocks) > self._data_chunks]
            cut[self._table.find(node_id)] = sorted(positions)
        lost = bytes(self._table.marked)
        self._table.mark(cut)
        for number, layer in self._maps.items():
            for first, place in self._table.marked_leaves(layer):
                for position in cut[place]:
                    offset = (first + position) * self._chunk_size
                    if offset < layer.size:
                        yield Range(names[number], offset, min(self._chunk_size, layer.size - offset), "the data file is cut off")
        self._table.marked = bytearray(lost)

    def _values_of(self, ids: array[int]) -> Iterator[tuple[int, bytes]]:
        wanted = set(ids)
        return ((node_id, value) for node_id, value in self._sources.numbered(NODE) if node_id in wanted)

    def _adopt_orphans(self) -> None:
        """Parts of maps that nothing leads to become layers, if anything was lost; else they are leaks."""
        if not self._damaged:
            return
        deleted = bytearray(len(self._table.ids))
        for node_id in self._salvage.queue():
            if (place := self._table.find(node_id)) >= 0:
                self._table.reach(place, deleted)
        orphans = [place for place, named in enumerate(self._table.named) if not (named or self._live[place] or deleted[place])]
        nameless = [number for number in self._layers if number not in self._maps]
        for place in orphans:
            self._table.reach(place, self._live)
            height = self._table.levels[place] + 1
            end = self._mapped_end(place) * self._chunk_size
            if len(orphans) == len(nameless) == 1:
                number = nameless[0]
                kin = [layer for other, layer in self._maps.items() if other == self._layers[number].parent or self._layers[other].parent == number]
                size = max([end, *(layer.size for layer in kin)])
                self._done.found.append(self._layers[number].name)
            else:
                number, size = max([0, *self._layers, *self._maps]) + 1, end
                self._layers[number] = LayerRecord(self._free_name(f"lost-{self._table.ids[place]}"), None, None, time.time())
                self._done.found.append(self._layers[number].name)
            self._maps[number] = LayerMap(self._table.ids[place], height, max(size, 1), 0, 1)

    def _mapped_end(self, place: int) -> int:
        """How many chunks it is to the end of the last leaf below a node."""
        first = 0
        while self._table.levels[place]:
            span = FANOUT ** self._table.levels[place]
            found = [
                (position, child) for position, child_id in self._table.children(place) if self._table.is_child(place, child := self._table.find(child_id))
            ]
            if not found:
                break
            first += found[-1][0] * span
            place = found[-1][1]
        return first + FANOUT

    def _free_name(self, name: str) -> str:
        taken = {record.name for record in self._layers.values()}
        return next(full for n in range(len(taken) + 1) if (full := name if n == 0 else f"{name}-{n}") not in taken)

    def _mark_losers(self) -> None:
        """Labels the layers that lost something, and takes from them what names them by their content."""
        lost: dict[str, list[str]] = {}
        for one in self._done.lost:
            lost.setdefault(one.layer, []).append(f"{one.offset}+{one.length}")
        for record in self._layers.values():
            ranges = lost.get(record.name)
            if ranges is None:
                continue
            record.labels[LOST_LABEL] = " ".join(ranges[:_LABEL_RANGES_MAX]) + (" ..." if len(ranges) > _LABEL_RANGES_MAX else "")
            if "chain" in record.digests or record.name.startswith("blob/"):
                old, record.name = record.name, self._free_name(f"damaged/{record.name}"[:_NAME_MAX])
                self._done.renamed[old] = record.name
            record.digests = {}

    # --- the new records ---

    def _records(self) -> Iterator[Record]:
        """All of the engine's: live nodes, then what follows from them."""
        table, cut = self._table, set(self._cut_leaves)
        for node_id, value in self._sources.numbered(NODE):
            place = table.find(node_id)
            if self._live[place]:
                yield NODE, key_of(node_id), self._mended(node_id, place, value, cut=node_id in cut)
        yield from self._node_counts()
        for number, layer in self._maps.items():
            root = table.find(layer.root) if layer.root else -1
            references = table.references[root] if root >= 0 else 0
            yield MAP, key_of(number), of_varints(MAP, key_of(number), (layer.root, layer.height, layer.size, references, layer.sealed))
        yield from self._chunk_counts()

    def _mended(self, node_id: int, place: int, value: bytes, *, cut: bool) -> bytes:
        """A node without what it names in vain; its references are put right in the table."""
        table, reader = self._table, self._reader
        level = table.levels[place]
        if level:
            if all(table.is_child(place, table.find(child)) for _, child in table.children(place)):
                return value
            entries = [0] * FANOUT
            for position, child in table.children(place):
                if table.is_child(place, table.find(child)):
                    entries[position] = child
            return reader.make(node_id, level, entries)
        if not cut:
            return value
        reader.read(node_id, value, splits=True)
        end = self._data_chunks
        entries = [entry if entry <= end else 0 for entry in reader.entries()]
        splits = []
        for position, own, blocks in reader.splits():
            left = [block if block <= end else 0 for block in blocks]
            if any(left):
                splits.append((position, own if own <= end else 0, left))
        return reader.make(node_id, 0, entries, splits)

    def _node_counts(self) -> Iterator[Record]:
        table = self._table
        named = array("L", bytes(len(table.ids) * array("L").itemsize))
        for layer in self._maps.values():
            if layer.root:
                named[table.find(layer.root)] += 1
        for place in table.inner():
            if self._live[place]:
                for _, child_id in table.children(place):
                    if table.is_child(place, child := table.find(child_id)):
                        named[child] += 1
        values, page = new_page(), -1
        for place, node_id in enumerate(table.ids):
            if not self._live[place]:
                continue
            if node_id // PAGE_VALUES != page:
                if page >= 0:
                    yield NODE_PAGE, key_of(page), make_page(NODE_PAGE, page, values)
                values, page = new_page(), node_id // PAGE_VALUES
            values[node_id % PAGE_VALUES] = named[place]
        if page >= 0:
            yield NODE_PAGE, key_of(page), make_page(NODE_PAGE, page, values)

    def _chunk_counts(self) -> Iterator[Record]:
        """Counts, summaries and the pool's counters: what no map names is free, and may hold anything."""
        allocated, summary = 0, new_page()
        checksums = Checksums(self._salvage, lambda _: None)
        counted = [(References(0, 0), self._live)]
        if (restored := self._sources.restored) is not None and (own := self._below(self._maps.keys() & restored.layers.keys())) != self._live:
            counted.append((References(0, 0), own))  # what only other backups hold may have held other bytes then, and had their checksums
        references, known = counted[0][0], counted[-1][0]
        for page in range(self._pages):
            first = page * PAGE_VALUES
            if first >= references.first + references.length:
                for one, live in counted:
                    one.move(first, min(self._pages * PAGE_VALUES - first, self._memory_chunks))
                    self._count(one, live)
            counts = references.counts(page)
            taken = PAGE_VALUES - counts.count(0)
            allocated += taken
            summary[page % PAGE_VALUES] = PAGE_VALUES - taken << 16
            yield CHUNK_PAGE, key_of(page), make_page(CHUNK_PAGE, page, [count + 1 for count in counts])
            yield from self._checksums(page, known.counts(page), checksums.page(page))
            if (page + 1) % PAGE_VALUES == 0 or page + 1 == self._pages:
                yield SUMMARY, key_of(page // PAGE_VALUES), make_page(SUMMARY, page // PAGE_VALUES, summary)
                summary = new_page()
        next_node = max([self._counters[0] if self._counters else 1, *(self._table.ids[-1:] and [self._table.ids[-1] + 1])])
        numbers = [next_node, self._pages, allocated, self._pages * PAGE_VALUES - allocated, *self._counters[4:5]]
        yield STATE, key_of(0), of_varints(STATE, key_of(0), numbers)

    @staticmethod
    def _checksums(page: int, counts: list[int], checksums: Any) -> Iterator[Record]:
        """Those of chunks that a map names, by these counts."""
        for at in range(0, PAGE_VALUES, CHECKSUM_VALUES):
            values = [checksums[i] if counts[i] else 0 for i in range(at, at + CHECKSUM_VALUES)]
            if any(values):
                number = (page * PAGE_VALUES + at) // CHECKSUM_VALUES
                yield CHECKSUM, key_of(number), make_page(CHECKSUM, number, values)

    def _count(self, references: References, live: bytearray) -> None:
        cut = set(self._cut_leaves)
        for node_id, value in self._sources.numbered(NODE):
            place = self._table.find(node_id)
            if live[place] and self._table.levels[place] == 0:
                self._reader.read(node_id, self._mended(node_id, place, value, cut=node_id in cut), references)


def _pool_record(chunk_size: int, path: Path) -> dict[str, Any]:
    if not chunk_size:
        raise DamagedError(f"the pool {path} has lost its own record, and with it the size of its chunks: say --chunk-size")
    features: dict[str, list[str]] = {"incompatible": [], "read_compatible": sorted(KNOWN_READ_COMPATIBLE), "compatible": []}
    return {"version": FORMAT_VERSION, "uuid": str(uuid.uuid4()), "chunk_size": chunk_size, "capacity": 0, "features": features}
