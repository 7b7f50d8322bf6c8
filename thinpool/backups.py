"""Copies of the metadata, compact, named by their time. A pool makes some by itself, in ``meta.backups``, and drops them by age and count; held ones,
in ``meta.held``, are made on request, and stay until they are dropped.

A backup does not keep the chunks that it names: what was freed since may hold something else by now. Those of a held one are kept by
the pool, which has a hold on each layer (:mod:`thinpool.holds`).
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from .errors import BackupNotFound, ThinpoolError
from .poolfiles import sync_directory

_LOG = logging.getLogger("thinpool")
DIRECTORY, HELD_DIRECTORY = "meta.backups", "meta.held"
INTERVAL_SECONDS = 3600.0
FIRST_INTERVAL_SECONDS, FIRST_COUNT = 60.0, 3  # a new pool changes from nothing to something
COUNT_MAX = 8
AGE_MAX_SECONDS = 30 * 86400.0
_LOOK_SECONDS = 60.0
_UNFINISHED = ".new"
_TIME = "%Y%m%dT%H%M%S.%fZ"


class Source(Protocol):
    """What is backed up: an open metadata store."""

    @property
    def path(self) -> Path: ...
    def last_txn(self) -> int: ...
    def copy_to(self, directory: Path) -> None: ...


def backups(pool: Path) -> list[Path]:
    """Those that the pool in that directory has made by itself, the newest first."""
    return _finished(pool / DIRECTORY)


def held_backups(pool: Path) -> list[Path]:
    """Those that are held, the newest first."""
    return _finished(pool / HELD_DIRECTORY)


def all_backups(pool: Path) -> list[Path]:
    """Both, the newest first."""
    return sorted((*backups(pool), *held_backups(pool)), key=lambda path: path.name, reverse=True)


def is_held(backup: Path) -> bool:
    """Whether it is a held one."""
    return backup.parent.name == HELD_DIRECTORY


def find_backup(pool: Path, name: str) -> Path:
    """The backup of that name. Raises BackupNotFound."""
    found = next((path for path in all_backups(pool) if path.name == name), None)
    if found is None:
        raise BackupNotFound(f"no metadata backup {name!r} in {pool}")
    return found


def _finished(directory: Path) -> list[Path]:
    return sorted((path for path in directory.iterdir() if path.suffix != _UNFINISHED), reverse=True) if directory.is_dir() else []


def new_name(pool: Path) -> str:
    """The name of a backup that is made now. It sorts after those that there are, also when the clock was set back: the newest is what is kept."""
    name = datetime.now(UTC).strftime(_TIME)
    for newest in all_backups(pool)[:1]:
        with suppress(ValueError):  # which is no name of ours
            name = max(name, (datetime.strptime(newest.name, _TIME) + timedelta(microseconds=1)).strftime(_TIME))
    return name


def make_backup(store: Source, hold: str = "") -> Path:
    """A backup of the committed state, durable when it returns; old ones are dropped. ``hold``: the name of one that is to be held.

    Raises OutOfSpace, DiskError.
    """
    pool = store.path.parent
    directory, name = pool / (HELD_DIRECTORY if hold else DIRECTORY), hold or new_name(pool)
    directory.mkdir(mode=0o700, exist_ok=True)
    unfinished = directory / f"{name}{_UNFINISHED}"
    unfinished.mkdir(mode=0o700)
    try:
        store.copy_to(unfinished)
        unfinished.rename(directory / name)
        for changed in (directory, pool):
            sync_directory(changed)
    except BaseException:
        for made in (unfinished, directory / name):
            shutil.rmtree(made, ignore_errors=True)
        raise
    if not hold:
        _drop_old(pool)
    return directory / name


def remove_backup(backup: Path) -> None:
    """Removes it: from the moment it begins there is none of that name, whenever the power goes."""
    going = backup.with_name(f"{backup.name}{_UNFINISHED}")
    backup.rename(going)
    sync_directory(backup.parent)
    shutil.rmtree(going, ignore_errors=True)


def remove_unfinished(pool: Path) -> None:
    """What is left of held backups that were being made or removed when their process ended. The pool's lock is held."""
    for path in (pool / HELD_DIRECTORY).glob(f"*{_UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


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
        if not made or not 0 <= time.time() - made[0].stat().st_mtime <= interval:
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
