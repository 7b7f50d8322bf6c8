"""Which inodes of an ext4 may differ from those of the one that it is a clone of, told by the blocks that differ.

Two things make an inode suspect: its own bytes in the inode table differ (times of access apart), or a block of its data does. The kernel changes an
inode whenever it changes its data, so the first finds nearly all; the second proves it. Blocks that differ and belong neither
to the file system itself nor to an inode that is suspect already are compared, and if they really differ, their owner is looked up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..layer import Layer
    from .ext4 import Ext4

Range = tuple[int, int]
"""(offset, length) in bytes."""

_BLOCK = 4096
_PIECE = 1 << 20
_TABLE_PIECE = 64 << 10
_FIRST_ORDINARY = 11
# Of an inode's bytes: time of access, checksum (low), checksum (high), time of access (finer), as (from, to).
_PASSED_OVER = ((0x08, 0x0C), (0x7C, 0x7E), (0x82, 0x84), (0x8C, 0x90))


class Ranges:
    """Ranges in order, none touching another."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self.all: list[Range] = []
        for offset, length in sorted(ranges):
            if self.all and offset <= sum(self.all[-1]):
                before = self.all[-1][0]
                self.all[-1] = before, max(sum(self.all[-1]), offset + length) - before
            elif length:
                self.all.append((offset, length))

    def within(self, offset: int, length: int) -> Iterator[Range]:
        """What of a range is in them."""
        end = offset + length
        for index in range(max(0, bisect_right(self.all, (offset, end)) - 1), len(self.all)):
            start = max(offset, self.all[index][0])
            if start >= end:
                break
            stop = min(end, sum(self.all[index]))
            if start < stop:
                yield start, stop - start

    def without(self, others: Ranges) -> Ranges:
        """What of these is not in others."""
        left = []
        for offset, length in self.all:
            for start, taken in others.within(offset, length):
                left.append((offset, start - offset))
                offset, length = start + taken, offset + length - start - taken
            left.append((offset, length))
        return Ranges(left)


def changed_inodes(base: Ext4, layer: Ext4, changed_blocks: Iterable[Range], inodes: Iterable[int]) -> set[int]:
    """Inodes of ``layer`` that may differ from those of ``base`` with the same number. ``inodes``: all that have a name, for looking up owners."""
    changed = Ranges(changed_blocks)
    suspects = set(_inodes_that_differ(base, layer, changed))
    named = list(inodes)
    own = [block for inode in range(1, _FIRST_ORDINARY) for block in layer.blocks(inode)]
    own += [block for inode in suspects.intersection(named) for block in layer.blocks(inode)]
    rest = changed.without(Ranges([*layer.metadata_ranges(), *own]))
    used = [part for offset, length in rest.all for part in layer.in_use(offset, length)]
    differing = Ranges(_blocks_that_differ(base.layer, layer.layer, used))
    if differing.all:
        suspects |= {inode for inode in named if inode not in suspects and any(any(differing.within(*block)) for block in layer.blocks(inode))}
    return suspects


def _inodes_that_differ(base: Ext4, layer: Ext4, changed: Ranges) -> Iterator[int]:
    """By their bytes in the inode tables. Numbers that only one of the two has are left out: no path has them in both."""
    size, at = layer.inode_size, {first: offset for first, offset, _ in base.inode_tables()}
    for first, offset, length in layer.inode_tables():
        if first not in at:
            continue
        moved = at[first] - offset  # by resize2fs
        for start, count in changed.within(offset, length) if not moved else [(offset, length)]:
            for piece in range(start, start + count, _TABLE_PIECE):
                wanted = min(_TABLE_PIECE, start + count - piece)
                old, new = base.layer.pread(wanted, piece + moved), layer.layer.pread(wanted, piece)
                if old != new:
                    number = first + (piece - offset) // size
                    yield from (number + index for index in range(wanted // size) if _differ(old, new, index * size, size))


def _differ(old: bytes, new: bytes, start: int, size: int) -> bool:
    one, other = bytearray(old[start : start + size]), bytearray(new[start : start + size])
    if one == other:
        return False
    for begin, end in _PASSED_OVER:
        if end <= size:
            one[begin:end] = other[begin:end]
    return one != other


def _blocks_that_differ(base: Layer, layer: Layer, ranges: Iterable[Range]) -> Iterator[Range]:
    """The diff names all that may differ; these do. What the base is too small for does."""
    for offset, length in ranges:
        for piece in range(offset, offset + length, _PIECE):
            wanted = min(_PIECE, offset + length - piece)
            old = base.pread(max(0, min(wanted, base.size - piece)), min(piece, base.size))
            new = layer.pread(wanted, piece)
            if old != new:
                yield from ((piece + at, _BLOCK) for at in range(0, wanted, _BLOCK) if old[at : at + _BLOCK] != new[at : at + _BLOCK])
