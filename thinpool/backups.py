"""Copies of the metadata that a pool makes by itself, in ``meta.backups``: compact, named by their time, dropped by age and count.

A backup does not keep the chunks that it names: what was freed since may hold something else by now.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Protocol

from .errors import ThinpoolError

_LOG = logging.getLogger("thinpool")
DIRECTORY = "meta.backups"
INTERVAL_SECONDS = 3600.0
FIRST_INTERVAL_SECONDS, FIRST_COUNT = 60.0, 3  # a new pool changes from nothing to something
COUNT_MAX = 8
AGE_MAX_SECONDS = 30 * 86400.0
_LOOK_SECONDS = 60.0


class Source(Protocol):
    """What is backed up: an open metadata store."""

    @property
    def path(self) -> Path: ...
    def last_txn(self) -> int: ...
    def copy_to(self, directory: Path) -> None: ...


def backups(pool: Path) -> list[Path]:
    """The backups of the pool in that directory, the newest first."""
    directory = pool / DIRECTORY
    return sorted((path for path in directory.iterdir() if not path.name.endswith(".new")), reverse=True) if directory.is_dir() else []


def make_backup(store: Source) -> Path:
    """A backup of the committed state, durable when it returns; old ones are dropped. Raises OutOfSpace, DiskError."""
    pool = store.path.parent
    directory = pool / DIRECTORY
    directory.mkdir(mode=0o700, exist_ok=True)
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f".{time.time_ns() // 1000 % 10**6:06}Z"
    unfinished = directory / f"{name}.new"
    try:
        unfinished.mkdir(mode=0o700)
        store.copy_to(unfinished)
        unfinished.rename(directory / name)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _drop_old(pool)
    return directory / name


def _drop_old(pool: Path) -> None:
    """Drops what is too old, and what is too many; the newest stays whatever its age."""
    for place, path in enumerate(backups(pool)):
        if place >= COUNT_MAX or (place and path.stat().st_mtime < time.time() - AGE_MAX_SECONDS):
            shutil.rmtree(path, ignore_errors=True)


def make_if_due(store: Source) -> None:
    """A backup, if the newest is older than the interval; a failure is only logged."""
    try:
        made = backups(store.path.parent)
        interval = FIRST_INTERVAL_SECONDS if len(made) < FIRST_COUNT else INTERVAL_SECONDS
        if not made or time.time() - made[0].stat().st_mtime > interval:
            make_backup(store)
    except (ThinpoolError, OSError) as error:
        _LOG.warning("no metadata backup could be made: %s", error)


class BackupKeeper(threading.Thread):
    """Makes the backups of a pool that is open for writing: now and then while it is, and when it is closed."""

    def __init__(self, store: Source) -> None:
        super().__init__(name="thinpool-backups", daemon=True)
        self._store = store
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Ends the thread, once a backup that is due has been made."""
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        seen, stopping = -1, False
        while not stopping:
            stopping = self._stop_asked.wait(_LOOK_SECONDS)
            if (txn := self._store.last_txn()) != seen:
                make_if_due(self._store)
                seen = txn
