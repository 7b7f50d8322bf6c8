"""Compaction: split entries are put together, chunks move down in the data file, and its end is cut off, while I/O goes on (``csrc/compact.c``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .api import Compacted, Progress
from .commits import Committer, drain
from .engine import Engine, EngineLayer, _core, _ffi
from .errors import BackupHeld, LayerDeleted, OutOfSpace

if TYPE_CHECKING:
    from .pool import Pool


class _Compaction:
    """One that is under way in the core: ``total`` chunks were to move, ``moved`` have."""

    def __init__(self, engine: Engine, ceiling: int) -> None:
        out, total = _ffi.new("tp_compaction **"), _ffi.new("uint64_t *")
        engine.check(_core.tp_compact_begin(engine.pointer, ceiling, out, total))
        self.pointer, self._engine, self._moved = out[0], engine, _ffi.new("uint64_t *")
        self.total = int(total[0])

    def step(self) -> bool:
        """Does a bounded part; true if there is more."""
        return bool(self._engine.check(_core.tp_compact_step(self.pointer, self._moved)))

    @property
    def moved(self) -> int:
        return int(self._moved[0])


@contextmanager
def _compaction(engine: Engine, ceiling: int) -> Iterator[_Compaction]:
    compaction = _Compaction(engine, ceiling)
    try:
        yield compaction
    finally:
        _core.tp_compact_end(compaction.pointer)


def merge(layer: EngineLayer) -> Iterator[int]:
    """Merges the layer's entries that are split over several chunks of its own, part by part; yields how many in each."""
    cursor, merged = _ffi.new("uint64_t *", 0), _ffi.new("uint64_t *")
    more = 1
    while more:
        merged[0] = 0
        more = layer.engine.check(_core.tp_layer_merge(layer.pointer, cursor, merged), layer.id)
        yield int(merged[0])


def merge_all(layers: Iterable[EngineLayer], tell: Progress) -> int:
    """The entries of all these layers that were merged."""
    merged = 0
    for layer in layers:
        with suppress(LayerDeleted):
            for found in merge(layer):
                merged += found
                tell(0, 0)
    return merged


def move_down(engine: Engine, committer: Committer, tell: Progress, ceiling: int = 0) -> int:
    """Empties the data file from the chunk ``ceiling`` on (0: as far as can be), and cuts its end off; how many chunks have moved."""
    size = engine.info().chunk_size
    with _compaction(engine, ceiling) as compaction:
        more = True
        while more:
            more = compaction.step()
            tell(compaction.moved * size, max(compaction.total, compaction.moved) * size)
        drain(engine)
        with suppress(OutOfSpace):
            committer.extend_window()  # to one that has nothing of what is to be cut off
        engine.check(_core.tp_shrink(engine.pointer))
        engine.flush()
        return compaction.moved


def compact(pool: Pool, progress: Progress | None = None) -> Compacted:
    """The method ``compact`` of :class:`~thinpool.pool.Pool`: makes the data file as short as its content allows, while all of it is in use.

    ``progress``: bytes moved, and bytes to move. What a reader, such as a check or a program that has the pool open read-only, still looks at stays
    where it is, and so much less is gained. Raises BackupHeld, as a held metadata backup says where its chunks are; OutOfSpace where the host's disk is full.
    """
    pool._require_writable()

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    def file() -> tuple[int, int]:
        found = (pool.path / "data").stat()
        return found.st_size, found.st_blocks * 512

    with pool._committer.compacting:
        with pool.atomically():
            if held := pool._catalog.holds():
                raise BackupHeld(f"chunks stay where held metadata backups name them: drop {', '.join(held)} first")
        length_before, host_before = file()
        drain(pool.engine)
        merged = merge_all([layer.handle for layer in pool.layers()], tell)
        moved = move_down(pool.engine, pool._committer, tell)
        return Compacted(moved * pool.chunk_size, merged, length_before, file()[0], host_before, file()[1])
