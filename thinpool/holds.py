"""Held metadata backups: whatever they name stays as it is, until they are dropped.

For each layer the pool then has a **hold**: a sealed layer of its own with the same map, by one more reference to its root. It has the label
:data:`~thinpool.catalog.HELD_LABEL`, and is hidden where layers are listed. So what keeps the chunks is what keeps those of any layer.
Holds and copy are made within one commit, so names, labels, digests and documents in the copy are those of that moment. Maps may be a little
later, for nothing stops writers: a restore gives each layer the map of its hold. ::

    meta.held/NAME.new   being made or removed: its holds are nobody's, and go when the pool is opened
    meta.held/NAME       held: its holds are durable in the pool

No hold's map ever changes, so the nodes below it are the same records in the pool and in the copy (:mod:`thinpool.recovery.held` needs that). Two things
could change it, and do not: compaction is refused as long as there are holds, and a hold is no layer's child, so that it is not rebased with
what was made from one (:func:`thinpool.digests.make_one`). What is in the trash, or only being imported, is not held.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import backups as copies
from .api import Backup
from .catalog import HELD_LABEL, HELD_LAYER_LABEL, PARTIAL_LABEL, TRASH_LABEL, LayerRecord
from .errors import ThinpoolError

if TYPE_CHECKING:
    from .pool import Pool

_NAME_MAX = 255


def describe(backup: Path) -> Backup:
    """What there is to say about one."""
    return Backup(backup.name, backup.stat().st_mtime, (backup / "data.mdb").stat().st_size, copies.is_held(backup))


def backups(pool: Pool) -> list[Backup]:
    """The metadata backups that there are, the newest first."""
    pool._require_open()
    return [describe(path) for path in copies.all_backups(pool.path)]


def make_backup(pool: Pool, *, hold: bool = False) -> Backup:
    """Copies the metadata. ``hold``: what it names now is kept until it is dropped; commits wait until the copy is made.

    Raises OutOfSpace or DiskError; there is no new backup then.
    """
    pool._require_open()
    if hold:
        pool._require_writable()
    return describe(_make_held(pool) if hold else copies.make_backup(pool._store))


class _Making:
    """A held backup in the making, as it takes part in a commit. ``result``: where the copy is, or why there is none."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool, self._name = pool, name
        self.result: Path | Exception | None = None

    def freezing(self) -> None:
        try:
            _hold_layers(self._pool, self._name)
        except Exception as error:
            self.result = error

    def stored(self) -> None:
        try:
            self.result = self.result or copies.make_backup(self._pool._store, self._name)
        except Exception as error:
            self.result = error


def _hold_layers(pool: Pool, backup: str) -> None:
    catalog, engine = pool._catalog, pool.engine
    for layer_id in catalog.ids():
        record = catalog.get(layer_id)
        assert record is not None
        if record.labels.keys() & {PARTIAL_LABEL, TRASH_LABEL}:
            continue
        layer = engine.layer(layer_id)
        hold = layer.branch(catalog.new_id(), layer.size, sealed=True)
        labels = {HELD_LABEL: backup, HELD_LAYER_LABEL: str(layer_id)}
        catalog.add(hold.id, LayerRecord(f"held/{backup}/{layer_id}/{record.name}"[:_NAME_MAX], None, None, time.time(), labels))


def _make_held(pool: Pool) -> Path:
    making = _Making(pool, name := copies.new_name(pool.path))
    with pool._committer.compacting:  # nothing moves from here on
        pool._store.use_features("holds")
        try:
            pool._committer.join_next(making)
            pool.commit()
            if isinstance(making.result, Path):
                return making.result
            assert making.result is not None
            raise making.result
        except BaseException:
            with suppress(ThinpoolError):
                pool.commit()  # from here on there is a copy, or there never will be
            if isinstance(making.result, Path):
                copies.remove_backup(making.result)
            with suppress(ThinpoolError):
                pool._committer.release_holds(name)
            raise


def drop_backup(pool: Pool, name: str) -> None:
    """Removes a metadata backup; of a held one, what nothing else needs is freed. Raises BackupNotFound, LayerBusy where a hold is mounted or attached."""
    pool._require_writable()
    backup = copies.find_backup(pool.path, name)
    for hold in pool.related(lambda catalog: catalog.holds().get(name, ())):
        pool.require_unused(hold, "drop")
    copies.remove_backup(backup)
    pool._committer.release_holds(name)
    pool.commit()
