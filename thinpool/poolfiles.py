"""The files of a pool's directory: made, found, locked.

::

    data        the chunks, sparse
    meta/       the LMDB environment
    lock        held (flock) by the one process that has the pool open for writing; holds its pid
    server.sock, server.log, run/   the pool's server, while there is one
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from .errors import DamagedError, PoolBusy, PoolExists, PoolNotFound


class PoolFiles:
    """Paths and descriptors of one pool's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.meta = path / "meta"
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
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

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

    def lock(self, held: int = -1) -> None:
        """Makes this process the pool's writer; ``held``: by a lock that another process took, and gave to this one.

        Raises PoolBusy with the pid of whoever is.
        """
        fd = os.dup(held) if held >= 0 else self._take_lock()
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        self.lock_fd = fd

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
