"""Commits and background work of an open pool: how the two seams are used together.

A commit (DESIGN.md, "Commit, flush and crash"), led by whichever thread's flush asks for it first::

    freeze  the engine's transaction and the catalog's changes, under the catalog's lock: one state (I8)
    sync    the data file: all that the frozen records name is on disk
    store   one LMDB transaction
    release what the transaction freed, as far as no reader looks at an older state (I4)

A failure on the way puts the engine into error mode: what the kernel has dropped cannot be known.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, time
from typing import Any, Protocol

from .backups import BackupKeeper, Source, held_backups, remove_unfinished
from .catalog import PARTIAL_LABEL, Catalog
from .engine import CORRUPT, WORK_COMMIT, WORK_OVERDUE, WORK_PUNCH, WORK_RECLAIM, WORK_WINDOW, Engine, EngineLayer
from .errors import OutOfSpace, PoolClosed, PoolFailed, ThinpoolError
from .records import Record

_LOG = logging.getLogger("thinpool")
COMMIT_INTERVAL_SECONDS = 1.0
WAY_OUT = "look at the kernel's log and the disk, end the process that has the pool open, and open it anew: all that was flushed is there"
"""Of error mode."""
_RECLAIM_STEP = 1 << 14  # entries, walked a node at a time
_PUNCH_STEP_BYTES = 16 << 20
_TRASH_INTERVAL_SECONDS = 60.0
_SHORT_CHUNKS, _SHORT_BYTES = 256, 64 << 20  # with less than that left, the trash is emptied


class RecordStore(Source, Protocol):
    """What commits need of the metadata store."""

    def fetch(self, kind: int, key: int) -> bytes | None: ...
    def fingerprint(self, digest: bytes) -> int | None: ...
    def commit(
        self,
        records: Iterable[Record],
        layers: Mapping[int, Mapping[str, Any] | None],
        fingerprints: Mapping[bytes, int],
        documents: Mapping[str, bytes | None],
    ) -> int: ...
    def put_window(self, record: Record) -> None: ...
    def oldest_reader(self) -> int: ...
    def close(self) -> None: ...


class Joining(Protocol):
    """Who takes part in a commit. Neither method raises anything."""

    def freezing(self) -> None:
        """The catalog is what will be stored, but for what is changed here. The lock is held."""

    def stored(self) -> None:
        """The store is what this commit has made it: no other begins before this returns."""


class Fingerprints:
    """mmh3-128 fingerprints of chunks that imports have seen: hints, each to be compared."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._noted: dict[bytes, int] = {}
        self._storing: dict[bytes, int] = {}
        self.shared_bytes = 0

    def find(self, digest: bytes) -> int | None:
        """A chunk that had this fingerprint when it was imported."""
        with self._lock:
            recent = self._noted.get(digest, self._storing.get(digest))
        return self._store.fingerprint(digest) if recent is None else recent

    def note(self, digest: bytes, chunk: int) -> None:
        """Remembers a chunk, durable with the next commit."""
        with self._lock:
            self._noted[digest] = chunk

    def count_shared(self, size_bytes: int) -> None:
        """So much was found to be there already, and is not stored twice (any more)."""
        with self._lock:
            self.shared_bytes += size_bytes

    def freeze(self) -> dict[bytes, int]:
        """What was noted since the last time, to be stored."""
        with self._lock:
            self._storing, self._noted = self._noted, {}
            return self._storing

    def release(self) -> None:
        """They are stored."""
        with self._lock:
            self._storing = {}


class Committer:
    """Runs commits and window extensions for one pool; it is the engine's :class:`~thinpool.records.Store`."""

    def __init__(self, store: RecordStore, catalog: Catalog, lock: threading.RLock) -> None:
        """``lock`` guards the catalog; changes that span catalog and engine are made under it."""
        self.engine: Engine
        self.fingerprints = Fingerprints(store)
        self.store = store
        self._catalog = catalog
        self._lock = lock
        self._window_lock = threading.Lock()
        self.compacting, self.healing = threading.Lock(), threading.Lock()  # one of each at a time
        self._failure = ""
        self.look: Callable[[], None] = lambda: None
        """Called when space may be running out: may raise the capacity."""
        self.users: Callable[[Any], tuple[str, ...]] = lambda _: ()  # of a layer; whoever knows sets it
        self._joining: list[Joining] = []

    def fetch(self, kind: int, key: int) -> bytes | None:
        """The committed value of one of the engine's records."""
        return self.store.fetch(kind, key)

    def layer_name(self, layer_id: int) -> str:
        """A name for messages."""
        record = self._catalog.get(layer_id)
        return record.name if record else f"number {layer_id}"

    def error_mode(self) -> dict[str, Any]:
        """What :class:`~thinpool.api.PoolUsage` says of it; empty: the pool is not in it."""
        info = self.engine.info()
        if not info.failed:
            return {}
        if info.failed == CORRUPT:
            return {"mode": "error", "cause": "counts in the metadata are damaged: maps name more than they count", "way_out": f"{WAY_OUT}; then repair it"}
        return {"mode": "error", "cause": self._failure or f"a sync of the data failed: {os.strerror(info.failed_errno)}", "way_out": WAY_OUT}

    def join_next(self, joining: Joining) -> None:
        """It takes part in the next commit, which there will be."""
        with self._lock:
            self._joining.append(joining)
            self.engine.touch()

    def commit(self) -> None:
        """One commit; the engine sees to it that there is one at a time. Raises PoolFailed, and then no later one succeeds."""
        with self._lock:
            joined, self._joining = self._joining, []
            for one in joined:
                one.freezing()
            records_changed = self.engine.freeze()
            layers, documents = self._catalog.take_changes()
            fingerprints = self.fingerprints.freeze()
        try:
            self.engine.sync()
            store_txn = 0
            if records_changed:
                store_txn = self.store.commit(self.engine.encoded(), layers, fingerprints, documents)
            for one in joined:
                one.stored()
            self.engine.release(store_txn, self.store.oldest_reader())
            self.fingerprints.release()
        except Exception as error:
            raise self._fail(error) from error

    def _fail(self, error: Exception) -> PoolFailed:
        """Error mode; what to raise."""
        self._failure = f"a commit failed: {error}"
        self.engine.fail()
        _LOG.error("commit failed, the pool is in error mode: %s", error)
        return PoolFailed(f"a commit failed ({error}): the pool is in error mode, reads go on: {WAY_OUT}")

    def extend_window(self) -> None:
        """Lets the engine hand out more clean chunks; one transaction of the store, no sync of the data."""
        if self._catalog.trash() and self._is_short():
            self.empty_trash()
        try:
            self._extend_window()
        except OutOfSpace:
            self.empty_trash()
            self.look()
            self._extend_window()
        else:
            self.look()

    def _extend_window(self) -> None:
        with self._window_lock:
            record = self.engine.plan_window()
            try:
                self.store.put_window(record)
            except PoolFailed as error:
                raise self._fail(error) from error
            self.engine.activate_window()

    def close(self) -> None:
        """Closes the engine, and the store when nobody extends the window any more."""
        self.engine.close()
        with self._window_lock:
            self.store.close()

    def _is_short(self) -> bool:
        """Whether hardly any space is left, of the pool's capacity or of the host's disk; of a quota on that only a refused write tells."""
        info = self.engine.info()
        left = info.capacity_chunks - info.allocated_chunks
        few = info.capacity_chunks > 0 and left <= min(info.capacity_chunks // 16, _SHORT_CHUNKS)
        return few or bool(info.refused) or shutil.disk_usage(self.store.path).free < _SHORT_BYTES

    # --- layers that go by themselves ---

    def remove_leftovers(self) -> None:
        """When a pool is opened: imports that never ended go, what has been in the trash for long enough, and holds without their backup."""
        pool = self.store.path.parent
        remove_unfinished(pool)
        with self._lock:
            for layer_id in self._catalog.ids(PARTIAL_LABEL):
                self._delete(self.engine.layer(layer_id))
            for backup in self._catalog.holds().keys() - {path.name for path in held_backups(pool)}:
                self.release_holds(backup)
        self.empty_trash(time())

    def release_holds(self, backup: str) -> None:
        """Deletes the holds of a metadata backup, which is gone or was never done."""
        with self._lock:
            for layer_id in self._catalog.holds().get(backup, ()):
                self._delete(self.engine.layer(layer_id))

    def empty_trash(self, now: float = math.inf) -> None:
        """Deletes what is in the trash, or what is to go by then; what is in use stays."""
        with self._lock:
            for layer in map(self.engine.layer, self._catalog.trash(now)):
                if not self.users(layer):
                    self._delete(layer)

    def kept_figures(self) -> tuple[int, int, int]:
        """How many layers there are besides the trash; and how many chunks emptying that would free, and how many dropping all held backups."""
        with self._lock:
            trash = [self.engine.layer(layer_id) for layer_id in self._catalog.trash()]
            holds = [self.engine.layer(layer_id) for ids in self._catalog.holds().values() for layer_id in ids]
            count = len(self._catalog.ids()) - len(trash)
        exclusive = [self.engine.exclusive_chunks(layers) if layers else 0 for layers in (trash, holds)]
        return count, exclusive[0], exclusive[1]

    def _delete(self, layer: EngineLayer) -> None:
        layer.delete()
        self._catalog.remove(layer.id)


class Housekeeper(threading.Thread):
    """Commits each second, extends the window ahead of need, reclaims deleted maps, punches free chunks; has metadata
    backups made, the space looked after, and the trash emptied."""

    def __init__(self, engine: Engine, committer: Committer) -> None:
        super().__init__(name="thinpool-housekeeper", daemon=True)
        self._engine, self._committer = engine, committer

    def run(self) -> None:
        keeper = BackupKeeper(self._committer.store)
        keeper.start()
        try:
            self._keep_house()
        finally:
            keeper.stop()

    def _keep_house(self) -> None:
        commit_at = monotonic() + COMMIT_INTERVAL_SECONDS
        trash_at = monotonic() + _TRASH_INTERVAL_SECONDS
        punching = False
        while True:
            try:
                work = self._engine.wait_work(0 if punching else max(0.0, commit_at - monotonic()))
                punching = self._step(work)
                if monotonic() >= trash_at:
                    trash_at = monotonic() + _TRASH_INTERVAL_SECONDS
                    self._committer.empty_trash(time())
                if work & WORK_OVERDUE or monotonic() >= commit_at:
                    commit_at = monotonic() + COMMIT_INTERVAL_SECONDS
                    if work & WORK_COMMIT:
                        self._engine.flush()
                    self._committer.look()
            except PoolClosed:
                return
            except PoolFailed as error:
                _LOG.warning("background work ends: %s", error)
                return
            except Exception as error:  # whatever it was, commits must go on
                _LOG.warning("background work: %s", error, exc_info=not isinstance(error, ThinpoolError))
                punching, commit_at = False, monotonic() + COMMIT_INTERVAL_SECONDS

    def _step(self, work: int) -> bool:
        """A bounded part of the most urgent work; true if there is more to punch."""
        if work & WORK_WINDOW:
            self._committer.extend_window()
        if work & WORK_RECLAIM:
            self._engine.reclaim(_RECLAIM_STEP)
        elif work & WORK_PUNCH:
            return self._engine.punch(_PUNCH_STEP_BYTES)
        return False


def drain(engine: Engine) -> None:
    """Reclaims, commits and punches until nothing is left of what was deleted."""
    while engine.reclaim(_RECLAIM_STEP):
        engine.flush()
    engine.flush()
    while engine.punch(_PUNCH_STEP_BYTES):
        continue
    engine.flush()
