"""All map nodes of a pool, in a few bytes each: who names whom, what is damaged, and which layers' ranges lie below."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..api import Range
from .records import FANOUT, LEVELS_MAX, NodeReader, References

DAMAGED = 255  # in place of the level


@dataclass(frozen=True, slots=True)
class LayerMap:
    """A layer's map record (FORMAT.md, "Layer maps")."""

    root: int
    height: int
    size: int
    mapped_refs: int
    sealed: int


class NodeTable:
    """Nodes by place, in the order of their ids: about 40 bytes each, and 9 for each child."""

    def __init__(self) -> None:
        self.ids = array("Q")
        self.levels = bytearray()
        self.references = array("Q")  # chunks named by the leaf, or by all leaves below
        self.named = array("L")  # how many nodes, roots and places in the reclaim queue name it
        self.marked = bytearray()  # it, or something below it, is what is looked for
        self._children: dict[int, tuple[bytes, array[int]]] = {}  # of inner nodes, by place: positions and ids
        self._by_level: list[list[int]] = [[] for _ in range(LEVELS_MAX)]
        self.chunks_end = 0

    def add(self, node_id: int, value: bytes, reader: NodeReader, chunks: References | None) -> bool:
        """A stored node; ids come in order. False: it is damaged."""
        if self.ids and node_id <= self.ids[-1]:
            return False
        sound = reader.read(node_id, value, chunks)
        place = len(self.ids)
        self.ids.append(node_id)
        self.named.append(0)
        self.marked.append(0)
        self.levels.append(reader.level if sound else DAMAGED)
        self.references.append(reader.references if sound else 0)
        if not sound:
            return False
        if reader.level:
            named = [(position, child) for position, child in enumerate(reader.entries()) if child]
            self._children[place] = (bytes(position for position, _ in named), array("Q", (child for _, child in named)))
            self._by_level[reader.level].append(place)
        else:
            self.chunks_end = max(self.chunks_end, reader.chunks_end)
        return True

    def add_unread(self, node_id: int) -> None:
        """A leaf of which no more is to be known."""
        self.ids.append(node_id)
        self.named.append(0)
        self.marked.append(0)
        self.levels.append(0)
        self.references.append(0)

    def find(self, node_id: int) -> int:
        """The place of a node, or -1."""
        place = bisect_left(self.ids, node_id)
        return place if place < len(self.ids) and self.ids[place] == node_id else -1

    def children(self, place: int) -> Iterator[tuple[int, int]]:
        """(position, id) of an inner node's children."""
        positions, ids = self._children.get(place, (b"", ()))
        return zip(positions, ids, strict=True)

    def inner(self) -> Iterator[int]:
        """The places of inner nodes, those of the lowest level first."""
        for places in self._by_level:
            yield from places

    def is_child(self, place: int, child: int) -> bool:
        """Whether the node at ``child`` can be what the one at ``place`` names: it is there, sound, and of the level below."""
        return child >= 0 and self.levels[child] == self.levels[place] - 1

    def count_references(self, on_missing: Callable[[int, int], None]) -> None:
        """Counts who names whom, marks the nodes below which something is missing, and sums up references; ``on_missing``: (id, child's id)."""
        for place in self.inner():
            for _, child_id in self.children(place):
                child = self.find(child_id)
                if child >= 0:
                    self.named[child] += 1
                if not self.is_child(place, child):
                    self.marked[place] = 1
                    if child < 0 or self.levels[child] != DAMAGED:
                        on_missing(self.ids[place], child_id)
                elif self.marked[child]:
                    self.marked[place] = 1
        self.sum_references()

    def sum_references(self) -> None:
        """The references of inner nodes, from those of the leaves below."""
        for place in self.inner():
            children = (self.find(child_id) for _, child_id in self.children(place))
            self.references[place] = sum(self.references[child] for child in children if self.is_child(place, child))

    def reach(self, root: int, into: bytearray) -> None:
        """Notes in ``into``, by place, the node at ``root`` and all below it."""
        stack = [root]
        while stack:
            place = stack.pop()
            if into[place]:
                continue
            into[place] = 1
            stack += [child for _, child_id in self.children(place) if self.is_child(place, child := self.find(child_id))]

    def mark(self, leaves: Iterable[int]) -> None:
        """Marks these nodes, by place, and all above them; nothing else stays marked."""
        self.marked = bytearray(len(self.ids))
        for place in leaves:
            self.marked[place] = 1
        for place in self.inner():
            self.marked[place] = any(self.marked[child] for _, child_id in self.children(place) if (child := self.find(child_id)) >= 0)

    def lost(self, layer: LayerMap) -> Iterator[tuple[int, int]]:
        """(first chunk, count) of the parts of a layer that cannot be found."""
        for first, count, _ in self._below(layer, missing=True):
            yield first, count

    def marked_leaves(self, layer: LayerMap) -> Iterator[tuple[int, int]]:
        """(first chunk, place of the leaf) of a layer's leaves that are marked."""
        for first, _, place in self._below(layer, missing=False):
            yield first, place

    def _below(self, layer: LayerMap, *, missing: bool) -> Iterator[tuple[int, int, int]]:
        if not layer.root:
            return
        root = self.find(layer.root)
        if root < 0 or self.levels[root] != layer.height - 1:
            if missing:
                yield 0, FANOUT**layer.height, -1
            return
        stack = [(root, 0, FANOUT**layer.height)]
        while stack:
            place, first, count = stack.pop()
            if place < 0 or (self.marked[place] and self.levels[place] == 0):
                yield first, count, place
                continue
            if not self.marked[place]:
                continue
            span = count // FANOUT
            for position, child_id in reversed(list(self.children(place))):
                child = self.find(child_id)
                if self.is_child(place, child):
                    stack.append((child, first + position * span, span))
                elif missing:
                    stack.append((-1, first + position * span, span))


def lost_ranges(table: NodeTable, maps: Mapping[int, LayerMap], names: Mapping[int, str], chunk_size: int) -> Iterator[Range]:
    """What is lost of each layer, in bytes, neighbours not joined."""
    for layer_id, layer in maps.items():
        for first, count in table.lost(layer):
            offset = first * chunk_size
            if offset < layer.size:
                yield Range(names[layer_id], offset, min(count * chunk_size, layer.size - offset), "its map is damaged")
