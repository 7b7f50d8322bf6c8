"""Reads the data file for what is known of its chunks: those with a checksum hold what it is of (I9), the others in use can be read, and
free clean ones are zeros (I6). In the order in which they lie there, a chunk at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..api import Progress
from ..engine import CHUNK_PAGE, is_zero
from ..poolfiles import PoolFiles
from .check import Tables, places_of_chunks, ranges_of_chunks, read_tables
from .checksums import Checksums, checksum_of, stored_checksums
from .records import PAGE_VALUES, new_page, read_page
from .report import Report
from .stored import Pin, StoredState

_CONFIRMATIONS = 5
_SUSPECTS_MAX = 1 << 16  # of each kind, to be looked at again

Place = tuple[str, int, int]
"""(layer, offset, length) of what a layer has in a chunk, in bytes."""
Places = dict[int, tuple[int, list[Place]]]
"""By chunk: its checksum (0: none), and what layers have in it."""


def scrub_chunks(path: Path, report: Report, progress: Progress | None = None, pin: Pin | None = None) -> Places:
    """Adds what is wrong with the chunks of the pool in ``path``, which may be in use; by this process, where ``pin`` is given (as :class:`StoredState` has
    it). ``progress``: bytes, of the data file's length.

    The chunks that are not what their checksums say, also those of them that cannot be read.
    """
    with _open_data(path) as files:
        scrub = _Scrub(files, report, pin)
        with scrub.state() as state:
            scrub.run(state, progress)
        scrub.confirm_clean()
        wrong = scrub.confirm_wrong()
        unreadable = scrub.unreadable
        if not wrong and not unreadable:
            return {}
        with scrub.state() as state:
            tables = read_tables(state, Report("full"))
            report.add_ranges(ranges_of_chunks(state, tables, unreadable.__contains__, "the host's disk cannot read it"))
            report.add_ranges(ranges_of_chunks(state, tables, (wrong.keys() - unreadable).__contains__, "it is not what its checksum says"))
            return _places(state, tables, wrong)


def look_again(path: Path, chunks: Collection[int], chunk_size: int, pin: Pin | None = None) -> Places:
    """The chunks, which were not what their checksums say, as they are in the newest committed state: without those that are what theirs say by now."""
    with _open_data(path) as files:
        scrub = _Scrub(files, Report("scrub"), pin)
        scrub.chunk_size = chunk_size
        scrub.suspect(chunks)
        wrong = scrub.confirm_wrong()
        with scrub.state() as state:
            right = stored_checksums(state, chunks).keys() - wrong.keys()
            return _places(state, read_tables(state, Report("full")), dict.fromkeys(set(chunks) - right, 0) | wrong)


@contextmanager
def _open_data(path: Path) -> Iterator[PoolFiles]:
    files = PoolFiles(path)
    files.open_data(read_only=True)
    try:
        yield files
    finally:
        files.close()


def _places(state: StoredState, tables: Tables, checksums: Mapping[int, int]) -> Places:
    found: Places = {chunk: (checksum, []) for chunk, checksum in sorted(checksums.items())}
    for chunk, layer_id, offset, length in places_of_chunks(state, tables, checksums.__contains__):
        found[chunk][1].append((tables.names[layer_id], offset, length))
    return found


class _Scrub:
    def __init__(self, files: PoolFiles, report: Report, pin: Pin | None = None) -> None:
        self._files, self._report, self._pin = files, report, pin
        self._suspects: set[int] = set()  # free, and not zeros
        self._wrong: set[int] = set()  # not what their checksums say
        self.unreadable: set[int] = set()  # and in use
        self.chunk_size = 0

    def state(self) -> StoredState:
        """The newest one."""
        return StoredState(self._files.meta, lambda _: None, self._pin)

    def suspect(self, chunks: Collection[int]) -> None:
        """These may not be what their checksums say."""
        self._wrong |= set(chunks)

    def run(self, state: StoredState, progress: Progress | None) -> None:
        """Reads all that holds data, and what has a checksum."""
        self.chunk_size = state.pool_record()["chunk_size"]
        counters, _, window = state.state()
        size = os.fstat(self._files.data_fd).st_size
        checksums = Checksums(state, lambda _: None)
        for page, value in state.chunk_pages(counters.pages if counters else 0):
            values = new_page()
            if value and not read_page(CHUNK_PAGE, page, value, values):
                continue  # the check has said so
            expected = {page * PAGE_VALUES + i: known for i, known in enumerate(checksums.page(page)) if known}
            self._report.checksums += len(expected)
            for chunk in sorted(expected.keys() | set(self._with_data(page, size))):
                allocated = values[chunk % PAGE_VALUES] > 1
                if not allocated and ((window and page in window) or values[chunk % PAGE_VALUES] == 1):
                    continue
                try:
                    content = self._read(chunk)
                except OSError as error:
                    if allocated:
                        self.unreadable.add(chunk)
                        if chunk in expected:
                            _add(self._wrong, chunk)
                        self._report.corrupt(f"chunk {chunk} cannot be read: {error.strerror}")
                    continue
                if not allocated and not is_zero(content):
                    _add(self._suspects, chunk)
                if allocated and chunk in expected and checksum_of(content) != expected[chunk]:
                    _add(self._wrong, chunk)
            if progress is not None:
                progress(min((page + 1) * PAGE_VALUES * self.chunk_size, size), size)

    def _read(self, chunk: int) -> bytes:
        return os.pread(self._files.data_fd, self.chunk_size, chunk * self.chunk_size)

    def _with_data(self, page: int, size: int) -> Iterator[int]:
        """The chunks of a page in which the file has no hole."""
        end, chunk = (page + 1) * PAGE_VALUES, page * PAGE_VALUES
        while chunk < end and chunk * self.chunk_size < size:
            try:
                at = os.lseek(self._files.data_fd, chunk * self.chunk_size, os.SEEK_DATA)
                stop = os.lseek(self._files.data_fd, at, os.SEEK_HOLE)
            except OSError:  # no data up to the end
                return
            first = max(chunk, at // self.chunk_size)
            chunk = min(-(-stop // self.chunk_size), end)
            yield from range(min(first, end), chunk)

    def confirm_wrong(self) -> dict[int, int]:
        """Tells of the chunks that are not what their checksums say, and gives these, with those that cannot be read: a checksum that is
        there before and after a chunk is read was there meanwhile, and with it nobody had begun to write to the chunk."""
        if not self._wrong:
            return {}
        before = self._stored()
        now = {chunk: self._checksum_now(chunk) for chunk in before}
        after = self._stored()
        wrong = {chunk: known for chunk, known in before.items() if now[chunk] != known and after.get(chunk) == known}
        for chunk in sorted(wrong.keys() - self.unreadable):
            self._report.corrupt(f"chunk {chunk} is not what its checksum says", "I9")
        return wrong

    def _checksum_now(self, chunk: int) -> int:
        try:
            return checksum_of(self._read(chunk))
        except OSError:
            return 0

    def _stored(self) -> dict[int, int]:
        with self.state() as state:
            return stored_checksums(state, self._wrong)

    def confirm_clean(self) -> None:
        """Tells of the clean chunks that hold data: those of which it is true in one state, for others were handed out meanwhile."""
        for _ in range(_CONFIRMATIONS):
            if not self._suspects:
                return
            txn = self._still_clean()
            self._suspects = {chunk for chunk in self._suspects if not is_zero(self._read(chunk))}
            if self._still_clean() == txn:
                break
        for chunk in sorted(self._suspects):
            self._report.corrupt(f"chunk {chunk} is free and should be zeros, but is not", "I6")

    def _still_clean(self) -> int:
        """Keeps the suspects that no transaction may be using in the newest state; that state's number."""
        with self.state() as state:
            counters, _, window = state.state()
            pages, clean = {chunk // PAGE_VALUES for chunk in self._suspects} - set(window or ()), set()
            for page, value in state.chunk_pages(counters.pages if counters else 0):
                values = new_page()
                if page in pages and (not value or read_page(CHUNK_PAGE, page, value, values)):
                    clean |= {chunk for chunk in self._suspects if chunk // PAGE_VALUES == page and values[chunk % PAGE_VALUES] == 0}
            self._suspects = clean
            return state.txn


def _add(suspects: set[int], chunk: int) -> None:
    if len(suspects) < _SUSPECTS_MAX:
        suspects.add(chunk)
