"""Checksums of chunks as they are stored, and chunks that are not what theirs say (docs/FORMAT.md, "Checksums")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, Protocol

from ..api import Buffer
from ..engine import CHECKSUM, crc32c
from .records import CHECKSUM_VALUES, PAGE_VALUES, new_page, read_page

_PER_PAGE = PAGE_VALUES // CHECKSUM_VALUES


def checksum_of(chunk: Buffer) -> int:
    """Of all bytes of a chunk; 0 stands for none."""
    return crc32c(chunk) or 1


class Numbered(Protocol):
    """Where the records are."""

    def numbered_again(self, kind: int) -> Iterator[tuple[int, bytes]]: ...


class Checksums:
    """The stored ones, read once in the order of chunks, a page of 1,024 at a time."""

    def __init__(self, state: Numbered, on_damage: Callable[[str], None]) -> None:
        self._records, self._on_damage = state.numbered_again(CHECKSUM), on_damage
        self._next = next(self._records, None)

    def page(self, page: int) -> Any:
        """Those of a page of chunks, 0 for those that have none; pages are asked for in order, and not twice."""
        values, unasked = new_page(), new_page()
        while self._next is not None and self._next[0] < (page + 1) * _PER_PAGE:
            number, value = self._next
            into = values if number // _PER_PAGE == page else unasked
            if not read_page(CHECKSUM, number, value, into + number % _PER_PAGE * CHECKSUM_VALUES):
                first = number * CHECKSUM_VALUES
                self._on_damage(f"the checksums of chunks {first} to {first + CHECKSUM_VALUES - 1} are damaged")
            self._next = next(self._records, None)
        return values

    def rest(self) -> int:
        """How many records there are behind the last page that was asked for."""
        count = 0
        while self._next is not None:
            count, self._next = count + 1, next(self._records, None)
        return count


def stored_checksums(state: Numbered, chunks: Iterable[int]) -> dict[int, int]:
    """Of those of the chunks that have one."""
    checksums, found = Checksums(state, lambda _: None), {}
    for page, some in groupby(sorted(chunks), lambda chunk: chunk // PAGE_VALUES):
        values = checksums.page(page)
        found.update({chunk: int(values[chunk % PAGE_VALUES]) for chunk in some if values[chunk % PAGE_VALUES]})
    return found
