"""Checks a pool: the invariants I1, I2, I3 and I8, and of I9 what the records say, over all records (docs/DESIGN.md), and that the metadata file is whole.

It reads one committed state (:mod:`.stored`), also of a pool that is in use. What takes memory is a few bytes for each map node (:mod:`.nodes`),
and four for each chunk: where those are more than the bound allows, the leaves are read again for each part of the chunks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import Progress, Range
from ..engine import BLOCK_SIZE, CHECKSUM, CHUNK_PAGE, MAP, NODE, NODE_PAGE, SUMMARY
from ..errors import DamagedError
from ..metadata import DOCUMENT, FINGERPRINT, unframe
from ..poolfiles import PoolFiles
from .checksums import Checksums
from .nodes import LayerMap, NodeTable, lost_ranges
from .records import PAGE_VALUES, NodeReader, References, compare, key_of, new_page, read_page, stray_checksum, varints
from .report import Report, joined
from .stored import Counters, StoredState

MEMORY_BYTES = 256 << 20
"""What the counts of chunks may take by default: those of 4 TiB in 64 KiB chunks."""
_PROGRESS_RECORDS = 4096
_NAMED_CHUNKS_MAX = 1000  # chunks whose layers are looked up for the report


def check(path: Path, *, quick: bool = False, memory_bytes: int = MEMORY_BYTES, progress: Progress | None = None) -> Report:
    """Checks the pool in the directory ``path``, which may be in use.

    ``quick`` leaves out the leaves of the maps and the counts of chunks. ``progress``: called with records read, and how many
    there are. Raises PoolNotFound, FormatError or PermissionError where there is nothing to check; PoolBusy where this process has it open.
    """
    files = PoolFiles(path)
    report = Report("quick" if quick else "full")
    try:
        files.require_pool()
        with ExitStack() as undo:
            undo.callback(files.close)
            state = undo.enter_context(StoredState(files.meta, report.corrupt))
            check_state(state, files, report, quick=quick, memory_bytes=memory_bytes, progress=progress)
    except DamagedError as error:
        report.corrupt(str(error))
    return report


def check_state(
    state: StoredState, files: PoolFiles, report: Report, *, quick: bool = False, memory_bytes: int = MEMORY_BYTES, progress: Progress | None = None
) -> None:
    """Checks one committed state, and the data file beside it."""
    _Check(state, report, memory_bytes, progress).run(files, quick=quick)


@dataclass(slots=True)
class Tables:
    """What a state holds but for counts: the pool's record and counters, layers' records, maps and names by id, and the nodes."""

    pool: dict[str, Any]
    counters: Counters
    layers: dict[int, dict[str, Any]]
    maps: dict[int, LayerMap]
    names: dict[int, str]
    nodes: NodeTable


def read_tables(state: StoredState, report: Report) -> Tables:
    """Reads them; what is damaged is left out, and in the report."""
    check = _Check(state, report, 0, None)
    check.read_tables()
    return check.tables


class _Check:
    """One check under way."""

    def __init__(self, state: StoredState, report: Report, memory_bytes: int, progress: Progress | None) -> None:
        self._state, self._report, self._progress = state, report, progress
        self._memory_chunks = max(memory_bytes // 4 // PAGE_VALUES, 1) * PAGE_VALUES
        self._total = sum(database.entries for database in state.databases.values())
        self._done = 0
        report.txn = state.txn

    def run(self, files: PoolFiles, *, quick: bool) -> None:
        state, report = self._state, self._report
        references = self.read_tables(quick=quick)
        self._check_node_counts()
        self._check_layers(quick=quick)
        self._check_chunks(references, quick=quick)
        self._check_rest(quick=quick)
        size = files.data.stat().st_size
        if size < self._counters.pages * PAGE_VALUES * self.chunk_size:
            report.corrupt(f"the data file is cut off: {size} bytes, where {self._counters.pages * PAGE_VALUES * self.chunk_size} are in use", "I3")
            self._report_chunks(lambda chunk: (chunk + 1) * self.chunk_size > size, "behind the end of the data file")
        sums = state.stored_sums
        if not quick and sums is not None and (sums.count, sums.checksums) != (state.sums.count, state.sums.checksums):
            report.corrupt(f"{state.sums.count} records, of {sums.count} by the sums over all of them: some are missing, or not as they were stored last", "I8")
        state.file.mark_free()
        if self._progress is not None:
            self._progress(self._total, self._total)

    def read_tables(self, *, quick: bool = False) -> References:
        """Reads counters, layers and nodes; the references to the first chunks."""
        pool = self._state.pool_record()
        self.chunk_size: int = pool["chunk_size"]
        counters, queue, window = self._state.state()
        self._counters = counters or Counters()
        self._know_counters = counters is not None
        if window is not None and len(set(window)) != len(window):
            self._report.corrupt("the allocation window names a page twice", "I6")
        layers, maps, names = self._read_layers()
        self.tables = Tables(pool, self._counters, layers, maps, names, NodeTable())
        references = References(0, 0 if quick else min(self._counters.pages * PAGE_VALUES, self._memory_chunks))
        self._read_nodes(references, queue, quick=quick)
        return references

    def _counted(self, records: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for item in records:
            self._done += 1
            if self._progress is not None and self._done % _PROGRESS_RECORDS == 0:
                self._progress(min(self._done, self._total), self._total)
            yield item

    # --- layers and nodes ---

    def _read_layers(self) -> tuple[dict[int, dict[str, Any]], dict[int, LayerMap], dict[int, str]]:
        report, records, maps = self._report, self._state.layers(), {}
        names = {number: record.get("name", f"number {number}") for number, record in records.items()}
        for number, value in self._state.numbered(MAP):
            try:
                maps[number] = LayerMap(*varints(MAP, key_of(number), value))
            except (DamagedError, TypeError):
                report.corrupt(f"the map record of layer {names.get(number, number)} is damaged", "I8")
                report.add_ranges(iter([Range(names.get(number, f"number {number}"), 0, 0, "all of it: its map record is damaged")]))
        for number in records.keys() ^ maps.keys():
            if number in maps:
                report.corrupt(f"layer number {number} has a map but no name", "I8")
                names[number] = f"number {number}"
            else:
                report.corrupt(f"layer {names[number]} has no map", "I8")
        if len(set(names.values())) != len(names):
            report.corrupt("two layers have the same name", "I8")
        for number, record in records.items():
            if record.get("parent") is not None and record["parent"] not in records:
                report.corrupt(f"the parent of layer {names[number]} is not there", "I8")
        report.layers = len(records)
        return records, maps, names

    def _read_nodes(self, chunks: References, queue: list[int], *, quick: bool) -> None:
        """Fills the table of nodes, with who names whom."""
        report, reader = self._report, NodeReader(self.chunk_size)
        table = self.tables.nodes
        for node_id, value in self._counted(self._state.numbered(NODE)):
            if quick and value[4:5] == b"\0":  # level 0: a leaf
                table.add_unread(node_id)
            elif not table.add(node_id, value, reader, chunks if chunks.length else None):
                report.corrupt(f"map node {node_id} is damaged")
        report.nodes = len(table.ids)
        table.count_references(lambda parent, child: report.corrupt(f"map node {parent} names node {child}, which is missing or not of the level below", "I2"))
        for node_id in (*(layer.root for layer in self.tables.maps.values() if layer.root), *queue):
            place = table.find(node_id)
            if place >= 0:
                table.named[place] += 1
            else:
                report.corrupt(f"map node {node_id}, the root of a map, is not there", "I2")
        if self._know_counters and table.ids and table.ids[-1] >= self._counters.next_node:
            report.corrupt(f"map node {table.ids[-1]} has an id that is to be given to another yet", "I2")

    def _check_node_counts(self) -> None:
        table, stored, found, at = self.tables.nodes, new_page(), new_page(), 0
        nothing = new_page()
        for page, value in self._counted(self._state.numbered(NODE_PAGE)):
            while at < len(table.ids) and table.ids[at] < page * PAGE_VALUES:
                at = self._compare_nodes(table.ids[at] // PAGE_VALUES, nothing, found, at)
            if not read_page(NODE_PAGE, page, value, stored):
                self._report.corrupt(f"the counts of map nodes {page * PAGE_VALUES} to {(page + 1) * PAGE_VALUES - 1} are damaged", "I2")
                while at < len(table.ids) and table.ids[at] < (page + 1) * PAGE_VALUES:
                    at += 1
                continue
            at = self._compare_nodes(page, stored, found, at)
        while at < len(table.ids):
            at = self._compare_nodes(table.ids[at] // PAGE_VALUES, nothing, found, at)

    def _compare_nodes(self, page: int, stored: object, found: object, at: int) -> int:
        """Compares one page with the table from place ``at`` on; the place behind it."""
        table, report = self.tables.nodes, self._report
        for i in range(PAGE_VALUES):
            found[i] = 0  # type: ignore[index]
        while at < len(table.ids) and table.ids[at] < (page + 1) * PAGE_VALUES:
            slot = table.ids[at] % PAGE_VALUES
            found[slot] = table.named[at]  # type: ignore[index]
            if table.named[at] == 0 and stored[slot] == 0:  # type: ignore[index]
                report.leak(f"map node {table.ids[at]} is named by nothing", "I2")
            at += 1
        result = compare(stored, found, chunks=False)
        if result.too_low:
            report.corrupt(f"map node {page * PAGE_VALUES + result.first_low} and {result.too_low - 1} more have a count below their references", "I2")
        if result.too_high:
            report.leak(f"map node {page * PAGE_VALUES + result.first_high} and {result.too_high - 1} more have a count above their references", "I2")
        return at

    def _check_layers(self, *, quick: bool) -> None:
        table, report = self.tables.nodes, self._report
        for number, layer in self.tables.maps.items():
            if (layer.root == 0) != (layer.height == 0):
                report.corrupt(f"layer {self.tables.names[number]}: a height of {layer.height} makes no sense", "I8")
            root = table.find(layer.root) if layer.root else -1
            if root >= 0 and table.levels[root] != layer.height - 1:
                report.corrupt(f"layer {self.tables.names[number]}: its root is not of its height", "I2")
            elif not quick and (root < 0 or not table.marked[root]):
                found = table.references[root] if root >= 0 else 0
                if found != layer.mapped_refs and (root >= 0) == bool(layer.root):
                    report.corrupt(f"layer {self.tables.names[number]}: its map names {found} chunks, and should name {layer.mapped_refs}", "I1")
        report.add_ranges(joined(lost_ranges(table, self.tables.maps, self.tables.names, self.chunk_size)))

    # --- chunks ---

    def _check_chunks(self, references: References, *, quick: bool) -> None:
        report, counters, end = self._report, self._counters, self._counters.pages * PAGE_VALUES
        summaries = self._read_summaries()
        if quick:
            if self._know_counters and (found := sum(value >> 16 for value in summaries.values())) != counters.dirty:
                report.corrupt(f"{found} chunks are free and not clean by the summaries, {counters.dirty} by the pool's counters", "I3")
            return
        if self.tables.nodes.chunks_end > end:
            report.corrupt(f"maps name chunks up to {self.tables.nodes.chunks_end - 1}, where only {end} are in use", "I3")
            self._report_chunks(lambda chunk: chunk >= end, "not among the pool's chunks")
        allocated = dirty = 0
        suspects: set[int] = set()
        stored, expected = new_page(), 0
        for _ in self._counted(self._state.numbered(CHECKSUM)):
            pass  # their pages and sums are looked at; what they say, in step with the counts
        checksums = Checksums(self._state, report.corrupt)
        for page, value in self._counted(self._state.chunk_pages(counters.pages)):
            if page >= counters.pages:
                if value:
                    report.corrupt(f"there are counts of chunks {page * PAGE_VALUES} and up, which are not in use", "I3")
                continue
            if page * PAGE_VALUES >= references.first + references.length:
                self._count_from(references, page * PAGE_VALUES)
            sound = read_page(CHUNK_PAGE, page, value, stored) if value else None
            if sound is False:
                report.corrupt(f"the counts of chunks {page * PAGE_VALUES} to {(page + 1) * PAGE_VALUES - 1} are damaged", "I1")
                continue
            counts = stored if sound else new_page()
            if (stray := stray_checksum(counts, checksums.page(page))) >= 0:
                report.corrupt(f"chunk {page * PAGE_VALUES + stray} is free and has a checksum", "I9")
            result = compare(counts, references.page(page), chunks=True)
            if result.too_low:
                report.corrupt(f"chunk {page * PAGE_VALUES + result.first_low} and {result.too_low - 1} more have a count below their references", "I1")
                suspects |= self._low_chunks(page, counts, references, room=_NAMED_CHUNKS_MAX - len(suspects))
            if result.too_high:
                report.leak(f"chunk {page * PAGE_VALUES + result.first_high} and {result.too_high - 1} more have a count above their references", "I1")
                report.leaked_chunks += result.unused
            if summaries.get(page, 0) != result.clean + (result.dirty << 16):
                report.corrupt(f"the summary of chunks {page * PAGE_VALUES} to {(page + 1) * PAGE_VALUES - 1} is not what their counts say", "I3")
            allocated, dirty, expected = allocated + result.allocated, dirty + result.dirty, expected + 1
        if checksums.rest():
            report.corrupt(f"there are checksums of chunks {counters.pages * PAGE_VALUES} and up, which are not in use", "I9")
        report.chunks = allocated
        if self._know_counters and expected == counters.pages and (allocated, dirty) != (counters.allocated, counters.dirty):
            report.corrupt(f"{allocated} chunks are allocated and {dirty} dirty; the pool's counters say {counters.allocated} and {counters.dirty}", "I3")
        if suspects:
            self._report_chunks(suspects.__contains__, "a chunk with a count that is too low")

    def _count_from(self, references: References, first: int) -> None:
        """Counts the references to the chunks from ``first`` on, as many as the bound allows: reads all leaves once more."""
        references.move(first, min(self._counters.pages * PAGE_VALUES - first, self._memory_chunks))
        reader = NodeReader(self.chunk_size)
        for key, value in self._state.items_again(NODE):
            reader.read(int.from_bytes(key, "big"), value, references)

    @staticmethod
    def _low_chunks(page: int, stored: object, references: References, *, room: int) -> set[int]:
        found, chunks = references.page(page), set[int]()
        for i in range(PAGE_VALUES):
            if len(chunks) < room and max(stored[i] - 1, 0) < found[i]:  # type: ignore[index]
                chunks.add(page * PAGE_VALUES + i)
        return chunks

    def _read_summaries(self) -> dict[int, int]:
        found: dict[int, int] = {}
        values = new_page()
        for number, value in self._state.numbered(SUMMARY):
            if not read_page(SUMMARY, number, value, values):
                self._report.corrupt(f"summary {number} of free chunks is damaged", "I3")
            else:
                found.update((number * PAGE_VALUES + i, summary) for i, summary in enumerate(values) if summary)
        return found

    def _report_chunks(self, wanted: Callable[[int], bool], why: str) -> None:
        """Adds the ranges of layers that name such chunks."""
        self._report.add_ranges(ranges_of_chunks(self._state, self.tables, wanted, why))

    # --- the rest ---

    def _check_rest(self, *, quick: bool) -> None:
        for key, value in self._state.items(DOCUMENT):
            try:
                content = unframe(DOCUMENT, key, value)
                if not key.startswith(b"tag/"):
                    json.loads(content)
            except (DamagedError, ValueError):
                self._report.corrupt(f"the document {key.decode(errors='replace')} is damaged", "I8")
        for key, value in self._state.items(FINGERPRINT):
            try:
                if not quick:
                    unframe(FINGERPRINT, key, value)
            except DamagedError:
                self._report.corrupt(f"the fingerprint {key.hex()} is damaged")


def places_of_chunks(state: StoredState, tables: Tables, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, int, int]]:
    """(chunk, layer's id, offset, length) of all that layers have in the wanted chunks. Reads all leaves again."""
    chunk_size = tables.pool["chunk_size"]
    reader = NodeReader(chunk_size)
    found: dict[int, list[tuple[int, int, int]]] = {}  # (offset in the leaf, length, chunk), by the place of the leaf
    for key, value in state.items_again(NODE):
        node_id = int.from_bytes(key, "big")
        if not reader.read(node_id, value, splits=True) or reader.level:
            continue
        parts = [(position * chunk_size, chunk_size, entry - 1) for position, entry in enumerate(reader.entries()) if entry and wanted(entry - 1)]
        for position, _, blocks in reader.splits():
            for number, block in enumerate(blocks):
                if block and wanted(block - 1):
                    parts.append((position * chunk_size + number * BLOCK_SIZE, BLOCK_SIZE, block - 1))
        if parts:
            found[tables.nodes.find(node_id)] = sorted(parts)
    tables.nodes.mark(found)
    for layer_id, layer in tables.maps.items():
        for first, place in tables.nodes.marked_leaves(layer):
            for within, length, chunk in found[place]:
                offset = first * chunk_size + within
                if offset < layer.size:
                    yield chunk, layer_id, offset, min(length, layer.size - offset)


def ranges_of_chunks(state: StoredState, tables: Tables, wanted: Callable[[int], bool], why: str) -> Iterator[Range]:
    """The ranges of layers that lie in the wanted chunks."""
    return joined(Range(tables.names[layer_id], offset, length, why) for _, layer_id, offset, length in places_of_chunks(state, tables, wanted))
