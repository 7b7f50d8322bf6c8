"""Reads the data file for what its chunks say by themselves: those in use can be read, and free clean ones are zeros (I6)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..api import Progress
from ..engine import CHUNK_PAGE, is_zero
from ..poolfiles import PoolFiles
from .check import ranges_of_chunks, read_tables
from .records import PAGE_VALUES, new_page, read_page
from .report import Report
from .stored import StoredState

_CONFIRMATIONS = 5


def scrub_chunks(path: Path, report: Report, progress: Progress | None = None) -> None:
    """Adds what is wrong with the chunks of the pool in ``path``, which may be in use. ``progress``: bytes, of the data file's length."""
    files = PoolFiles(path)
    files.open_data(read_only=True)
    try:
        scrub = _Scrub(files, report)
        with StoredState(files.meta, lambda _: None) as state:
            unreadable = scrub.run(state, progress)
        if unreadable:
            with StoredState(files.meta, lambda _: None) as state:
                tables = read_tables(state, Report("full"))
                report.add_ranges(ranges_of_chunks(state, tables, unreadable.__contains__, "the host's disk cannot read it"))
        scrub.confirm()
    finally:
        files.close()


class _Scrub:
    def __init__(self, files: PoolFiles, report: Report) -> None:
        self._files, self._report = files, report
        self._suspects: set[int] = set()
        self.chunk_size = 0

    def run(self, state: StoredState, progress: Progress | None) -> set[int]:
        """Reads all that holds data; the chunks in use that cannot be read."""
        self.chunk_size = state.pool_record()["chunk_size"]
        counters, _, window = state.state()
        size, unreadable = os.fstat(self._files.data_fd).st_size, set[int]()
        for page, value in state.chunk_pages(counters.pages if counters else 0):
            values = new_page()
            if value and not read_page(CHUNK_PAGE, page, value, values):
                continue  # the check has said so
            for chunk in self._with_data(page, size):
                allocated = values[chunk % PAGE_VALUES] > 1
                if not allocated and ((window and page in window) or values[chunk % PAGE_VALUES] == 1):
                    continue
                try:
                    zero = is_zero(os.pread(self._files.data_fd, self.chunk_size, chunk * self.chunk_size))
                except OSError as error:
                    if allocated:
                        unreadable.add(chunk)
                        self._report.corrupt(f"chunk {chunk} cannot be read: {error.strerror}")
                    continue
                if not allocated and not zero:
                    self._suspects.add(chunk)
            if progress is not None:
                progress(min((page + 1) * PAGE_VALUES * self.chunk_size, size), size)
        return unreadable

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

    def confirm(self) -> None:
        """Tells of the clean chunks that hold data: those of which it is true in one state, for others were handed out meanwhile."""
        for _ in range(_CONFIRMATIONS):
            if not self._suspects:
                return
            txn = self._still_clean()
            self._suspects = {chunk for chunk in self._suspects if not is_zero(os.pread(self._files.data_fd, self.chunk_size, chunk * self.chunk_size))}
            if self._still_clean() == txn:
                break
        for chunk in sorted(self._suspects):
            self._report.corrupt(f"chunk {chunk} is free and should be zeros, but is not", "I6")

    def _still_clean(self) -> int:
        """Keeps the suspects that no transaction may be using in the newest state; that state's number."""
        with StoredState(self._files.meta, lambda _: None) as state:
            counters, _, window = state.state()
            pages, clean = {chunk // PAGE_VALUES for chunk in self._suspects} - set(window or ()), set()
            for page, value in state.chunk_pages(counters.pages if counters else 0):
                values = new_page()
                if page in pages and (not value or read_page(CHUNK_PAGE, page, value, values)):
                    clean |= {chunk for chunk in self._suspects if chunk // PAGE_VALUES == page and values[chunk % PAGE_VALUES] == 0}
            self._suspects = clean
            return state.txn
