"""Held backups (:mod:`thinpool.holds`) beside a metadata environment that is made anew: what they hold is in the new one too.

No hold's map ever changes. So a node below a hold is the same record in its backup, in the pool, and in each backup that was made later: what one of them lacks
can be had from another.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import astuple, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from ..catalog import HELD_LABEL, HELD_LAYER_LABEL
from ..engine import MAP, NODE
from ..errors import BackupHeld, DamagedError
from .nodes import LayerMap, NodeTable
from .records import NodeReader, key_of, of_varints, varints
from .salvage import Salvage


class Held:
    """A held backup. ``holds``: the records of its holds, by id; ``layers``: the maps that the layers have by these, by id. A context manager."""

    def __init__(self, backup: Path) -> None:
        """Raises DamagedError where nothing can be read at all."""
        self.path, self.name = backup, backup.name
        self.salvage = Salvage(backup)
        self.holds = _holds(self.salvage, self.name)
        pool = self.salvage.pool_record()
        if pool is None:
            self.salvage.__exit__()
            raise DamagedError(f"the metadata backup {backup} has lost the pool's own record")
        self._table, reader = NodeTable(), NodeReader(pool["chunk_size"])
        for node_id, value in self.salvage.numbered(NODE):
            self._table.add(node_id, value, reader, None)
        self.layers, self._below = dict[int, LayerMap](), bytearray(len(self._table.ids))
        for number, value in self.numbered(MAP):
            hold = LayerMap(*varints(MAP, key_of(number), value))
            self.layers[int(self.holds[number]["labels"][HELD_LAYER_LABEL])] = hold
            if (place := self._table.find(hold.root)) >= 0:
                self._table.reach(place, self._below)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.salvage.__exit__()

    def numbered(self, kind: int) -> Iterator[tuple[int, bytes]]:
        """The maps of the holds, or the nodes below them."""
        for number, value in self.salvage.numbered(kind):
            if number in self.holds if kind == MAP else self._below[self._table.find(number)]:
                yield number, value


class Sources:
    """Layers, maps and nodes of an environment that is made anew: what can be read of the one in ``source``, and what held backups hold.

    ``salvage``: all that can be read of it. ``restored``: the held backup that it is, if so; then only what that holds is left of it. A context manager.
    """

    def __init__(self, source: Path, backups: Iterable[Path]) -> None:
        """Raises DamagedError where nothing can be read of ``source`` at all."""
        with ExitStack() as undo:
            self._held = []
            for backup in backups:
                with suppress(DamagedError):  # of one of which nothing can be read, the source says what it holds
                    self._held.append(undo.enter_context(Held(backup)))
            self.restored = next((backup for backup in self._held if backup.path == source), None)
            self.salvage = undo.enter_context(Salvage(source)) if self.restored is None else self.restored.salvage
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def layers(self) -> dict[int, dict[str, Any]]:
        """The layers' records, by id."""
        found = self.salvage.layers()
        if self.restored is not None:
            found = {number: record for number, record in found.items() if number in self.restored.layers}
        for backup in self._held:
            found = backup.holds | found
        return found

    def numbered(self, kind: int) -> Iterator[tuple[int, bytes]]:
        """Sound maps or nodes, by their numbers, in order."""
        last = 0
        for number, value in heapq.merge(self._own(kind), *(backup.numbered(kind) for backup in self._held), key=itemgetter(0)):
            if number != last:
                yield number, value
            last = number

    def _own(self, kind: int) -> Iterator[tuple[int, bytes]]:
        if self.restored is None:
            yield from self.salvage.numbered(kind)
        elif kind == MAP:  # all nodes are below its holds
            for number, value in self.salvage.numbered(kind):
                if (hold := self.restored.layers.get(number)) is not None:
                    layer = replace(hold, sealed=LayerMap(*varints(MAP, key_of(number), value)).sealed)
                    yield number, of_varints(MAP, key_of(number), astuple(layer))

    def require_holds(self) -> None:
        """Raises BackupHeld where the source is from before a held backup, and knows nothing of the chunks that it names."""
        for backup in self._held if self.restored is None else ():
            if not backup.holds.keys() <= _holds(self.salvage, backup.name).keys():
                raise BackupHeld(f"the held metadata backup {backup.name} would not be whole any more: restore that one, or drop it first")


def _holds(salvage: Salvage, backup: str) -> dict[int, dict[str, Any]]:
    return {number: record for number, record in salvage.layers().items() if record.get("labels", {}).get(HELD_LABEL) == backup}
