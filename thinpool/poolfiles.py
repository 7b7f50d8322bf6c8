"""The files of a pool's directory: made, found, locked.

::

    data        the chunks, sparse
    meta/       the LMDB environment
    meta.new/   another one, while it is being made
    meta.kept-N/    one that was replaced: by a repair, or from a backup
    meta.backups/   copies of it, made now and then
    healing/    another pool, while chunks are healed from an image
    .mkfs-*/    an image, while a file system is being made
    meta.held/      copies whose chunks are kept until they are dropped
    lock        held (flock) by the one process that has the pool open for writing; holds its pid
    server.sock, server.log, run/   the pool's server, while there is one
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from .errors import DamagedError, PoolBusy, PoolExists, PoolNotFound

MKFS_PREFIX = ".mkfs-"


class PoolFiles:
    """Paths and descriptors of one pool's directory."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))  # for a process that goes elsewhere, and for programs that run there
        self.data = self.path / "data"
        self.meta = self.path / "meta"
        self.healing = self.path / "healing"
        self.data_fd = -1
        self.lock_fd = -1

    def create(self) -> None:
        """Makes the directory with an empty data file. Raises PoolExists where there is anything already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            what = "is a pool already" if self.data.exists() else "exists and is not an empty directory"
            raise PoolExists(f"{self.path} {what}")
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.path, 0o700)
        os.close(os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self.meta.mkdir(mode=0o700)

    def sync(self) -> None:
        """The files' names survive a power cut."""
        for directory in (self.meta, self.path, self.path.parent):
            sync_directory(directory)

    def remove(self) -> None:
        """Undoes :meth:`create`."""
        self.data.unlink(missing_ok=True)
        (self.path / "lock").unlink(missing_ok=True)
        shutil.rmtree(self.meta, ignore_errors=True)

    def require_pool(self) -> None:
        """Raises PoolNotFound or DamagedError where this is no pool that could be opened."""
        if not self.path.is_dir():
            raise PoolNotFound(f"no pool at {self.path}: there is no such directory")
        has_data, has_meta = self.data.exists(), (self.meta / "data.mdb").exists()
        if not has_data and not has_meta:
            raise PoolNotFound(f"{self.path} is not a pool (thinpool init makes one)")
        if not has_data or not has_meta:
            raise DamagedError(f"the pool {self.path} has lost its {'data file' if has_meta else 'metadata'}")

    def open_data(self, *, read_only: bool) -> None:
        """Opens the data file. Raises PermissionError as the host does."""
        self.data_fd = os.open(self.data, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)

    def new_meta(self) -> Path:
        """An empty directory beside that of the metadata, for :meth:`replace_meta`. The lock is held."""
        new = self.path / "meta.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        return new

    def replace_meta(self, new: Path) -> Path:
        """Puts a complete environment in the place of the metadata, at once; where the old one is kept. The lock is held."""
        for directory in (new, self.path):
            sync_directory(directory)
        number = 1
        while (kept := self.path / f"meta.kept-{number}").exists():
            number += 1
        if self.meta.exists():
            new.rename(kept)  # before: from the exchange on the old one has the name that keeps it, whenever the power goes
            try:
                _exchange(kept, self.meta)
            except OSError:
                kept.rename(new)
                raise
        else:
            new.rename(self.meta)
        sync_directory(self.path)
        return kept

    def free(self) -> int:
        """Bytes that this process may still write to the host's disk."""
        found = os.statvfs(self.path)
        return (found.f_bavail if os.geteuid() else found.f_bfree) * found.f_frsize

    def lock(self, held: int = -1) -> None:
        """Makes this process the pool's writer; ``held``: by a lock that another process took, and gave to this one.

        What a writer that was killed has left on the disk is removed. Raises PoolBusy with the pid of whoever is.
        """
        fd = os.dup(held) if held >= 0 else self._take_lock()
        self.lock_fd = fd
        for left in (self.healing, *self.path.glob(f"{MKFS_PREFIX}*")):
            shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):  # only for messages; on a full disk there may be no room, so that the block it has is not given away first
            os.pwrite(fd, b"%-31d\n" % os.getpid(), 0)

    def remove_healing(self) -> None:
        """Removes the pool that chunks were healed from, if there is one. The lock is held."""
        shutil.rmtree(self.healing, ignore_errors=True)

    def _take_lock(self) -> int:
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).strip()
            os.close(fd)
            pid = int(holder) if holder.isdigit() else 0
            raise PoolBusy(f"the pool {self.path} is open in process {pid or 'unknown'}", pid) from None
        return fd

    def close(self) -> None:
        """Closes what is open; the lock goes last."""
        for name in ("data_fd", "lock_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)


def sync_directory(path: Path) -> None:
    """The names in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(one: Path, other: Path) -> None:
    """Each takes the other's name, at once. Raises OSError where the file system cannot do that; nothing has changed then."""
    import ctypes  # hardly anybody comes here

    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    if libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one))
