"""Two layers side by side: which ranges only one of them has, in which they differ, and which they share.

What ``thin_delta`` of thin-provisioning-tools says of two thin devices, in its words and in bytes. It is put together from what
:meth:`~thinpool.api.PoolAPI.diff` and :meth:`~thinpool.api.LayerAPI.extents` say, so it goes by maps, not by bytes: what both
wrote is different, whatever it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from .api import Extent

if TYPE_CHECKING:
    from .api import LayerAPI, PoolAPI

DeltaKind = Literal["left_only", "right_only", "different", "same"]


@dataclass(frozen=True, slots=True)
class Delta:
    """A range of two layers, in bytes. ``left_only``, ``right_only``: the other has a hole there; ``same``: both name the same chunks."""

    offset: int
    length: int
    kind: DeltaKind


def delta(pool: PoolAPI, left: str | LayerAPI, right: str | LayerAPI, *, same: bool = False) -> Iterator[Delta]:
    """The ranges in which one of the two holds data, in order; what they share only if ``same``. Costs the map of ``left``.

    Of layers that are being written, each range is as it was when it was come to. Raises LayerNotFound.
    """
    one, other = (pool.layer(layer) if isinstance(layer, str) else layer for layer in (left, right))
    last: Delta | None = None
    for offset, end, kind in _pieces(one, other, pool.diff(one, other)):
        if kind is None or (kind == "same" and not same):
            continue
        if last is not None and (last.offset + last.length, last.kind) == (offset, kind):
            last = Delta(last.offset, end - last.offset, kind)
            continue
        if last is not None:
            yield last
        last = Delta(offset, end - offset, kind)
    if last is not None:
        yield last


def _pieces(left: LayerAPI, right: LayerAPI, differing: Iterator[Extent]) -> Iterator[tuple[int, int, DeltaKind | None]]:
    """(begin, end, kind) from 0 to the end of the larger one; ``None``: two holes."""
    behind = Extent(left.size, max(right.size - left.size, 0), "hole")
    difference = next(differing, None)
    for extent in chain(left.extents(), [behind]):
        position, end = extent.offset, extent.offset + extent.length
        while position < end:
            while difference is not None and difference.offset + difference.length <= position:
                difference = next(differing, None)
            if difference is None or difference.offset >= end:
                yield position, end, "same" if extent.kind == "data" else None
                break
            if position < difference.offset:
                yield position, difference.offset, "same" if extent.kind == "data" else None
                position = difference.offset
            stop = min(end, difference.offset + difference.length)
            yield position, stop, _kind(extent, difference)
            position = stop


def _kind(left: Extent, right: Extent) -> DeltaKind | None:
    if left.kind == "data":
        return "different" if right.kind == "data" else "left_only"
    return "right_only" if right.kind == "data" else None
