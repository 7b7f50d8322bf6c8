"""Every exception of thinpool.

::

    ThinpoolError
    ├── PoolNotFound            FileNotFoundError   the directory is not a pool
    ├── PoolExists              FileExistsError     create: there is one already
    ├── PoolBusy                BlockingIOError     another process has it open for writing (.pid)
    ├── PoolClosed              ValueError          the pool was closed
    ├── PoolFailed              OSError(EIO)        error mode after a failed sync or commit: reads only
    ├── PoolReadOnly            OSError(EROFS)      opened with read_only=True
    ├── FormatError             OSError(EINVAL)     written by a newer version, or with unknown features
    ├── DamagedError            OSError(EIO)        a record or the data file does not match its checksum or length
    ├── OutOfSpace              OSError(ENOSPC)     the capacity, or the host's disk or quota, is used up
    ├── DiskError               OSError(…)          the host's disk failed a read, write or sync
    ├── LayerNotFound           KeyError
    ├── LayerExists             FileExistsError
    ├── LayerDeleted            ValueError
    ├── LayerSealed             PermissionError     a sealed layer never changes
    ├── LayerBusy               OSError(EBUSY)      attached, mounted or running (.users says by whom)
    ├── LayerState              ValueError          the operation needs another kind of layer
    ├── OutOfRange              ValueError          past the end of the layer
    ├── BadSize, BadName        ValueError
    ├── BadAddress              ValueError          where nobody can listen, or not without TLS
    ├── NeedsRoot               PermissionError     the kernel asks for root here (says what works without)
    ├── ImportFailed            OSError(EINVAL)     a tarball or image that cannot be taken in
    ├── ImageNotFound           KeyError
    ├── ImageBusy               OSError(EBUSY)      a container, or another image, needs it (.users says which)
    ├── BackupNotFound          FileNotFoundError   no metadata backup of that name
    ├── BackupHeld              OSError(EBUSY)      a held metadata backup would no longer be whole
    ├── BadReference            ValueError          not the name of an image
    ├── ContainerNotFound       KeyError
    ├── RegistryError           OSError(EREMOTEIO)  a registry refused, or does not keep to its protocol (.status)
    ├── ToolFailed              OSError(EIO)        a program of the host (mkfs, mount, …) failed
    └── ServerError             ConnectionError     the pool's server cannot be reached or failed
"""

from __future__ import annotations

import errno


class ThinpoolError(Exception):
    """Base of every exception that thinpool raises on purpose."""

    os_errno: int = 0

    def __init__(self, message: str) -> None:
        if isinstance(self, OSError):
            OSError.__init__(self, self.os_errno or errno.EIO, message)
        else:
            super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


def _rebuild(kind: type[ThinpoolError], message: str, fields: dict[str, object]) -> ThinpoolError:
    """For pickle and copy: OSError would take the message for something else."""
    error = kind(message)
    error.__dict__.update(fields)
    return error


class PoolNotFound(ThinpoolError, FileNotFoundError):
    """The directory is not a pool."""

    os_errno = errno.ENOENT


class PoolExists(ThinpoolError, FileExistsError):
    """There is a pool, or something else, in that directory already."""

    os_errno = errno.EEXIST


class PoolBusy(ThinpoolError, BlockingIOError):
    """Another process has the pool open for writing; ``pid`` says which (0: not known)."""

    os_errno = errno.EAGAIN

    def __init__(self, message: str, pid: int = 0) -> None:
        super().__init__(message)
        self.pid = pid


class PoolClosed(ThinpoolError, ValueError):
    """The pool was closed."""


class PoolFailed(ThinpoolError, OSError):
    """The pool is in error mode after a failed sync or commit: reads go on, writes fail."""

    os_errno = errno.EIO


class PoolReadOnly(ThinpoolError, OSError):
    """The pool was opened read-only."""

    os_errno = errno.EROFS


class FormatError(ThinpoolError, OSError):
    """The pool was written by a newer version, or with features this one does not know."""

    os_errno = errno.EINVAL


class DamagedError(ThinpoolError, OSError):
    """A stored record, or the data file, is not what was written."""

    os_errno = errno.EIO


NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the host says where a disk is full, or a quota on it, or a file as large as its file system or RLIMIT_FSIZE lets it be."""


class OutOfSpace(ThinpoolError, OSError):
    """The pool's capacity, or the host's disk, is used up."""

    os_errno = errno.ENOSPC


class DiskError(ThinpoolError, OSError):
    """The host's disk failed a read, a write or a sync."""

    def __init__(self, message: str, os_errno: int = errno.EIO) -> None:
        self.os_errno = os_errno
        super().__init__(message)


class LayerNotFound(ThinpoolError, KeyError):
    """No layer of that name."""


class LayerExists(ThinpoolError, FileExistsError):
    """A layer of that name exists."""

    os_errno = errno.EEXIST


class LayerDeleted(ThinpoolError, ValueError):
    """The layer was deleted."""


class LayerSealed(ThinpoolError, PermissionError):
    """A sealed layer never changes."""

    os_errno = errno.EPERM


class LayerBusy(ThinpoolError, OSError):
    """The layer is attached, mounted or running; ``users`` says by whom."""

    os_errno = errno.EBUSY

    def __init__(self, message: str, users: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.users = users


class LayerState(ThinpoolError, ValueError):
    """The operation needs another kind of layer."""


class OutOfRange(ThinpoolError, ValueError):
    """An offset or length past the end of the layer."""


class BadAddress(ThinpoolError, ValueError):
    """Where a server cannot listen: no address, one in use, or one that other machines reach without TLS."""


class BadSize(ThinpoolError, ValueError):
    """A size that cannot be understood or is out of bounds."""


class BadName(ThinpoolError, ValueError):
    """A name that a layer cannot have."""


class NeedsRoot(ThinpoolError, PermissionError):
    """The kernel asks for root here."""

    os_errno = errno.EPERM


class ImportFailed(ThinpoolError, OSError):
    """A tarball or image that cannot be taken in."""

    os_errno = errno.EINVAL


class ImageNotFound(ThinpoolError, KeyError):
    """No image of that name or id."""


class ImageBusy(ThinpoolError, OSError):
    """Something needs the image; ``users`` says what."""

    os_errno = errno.EBUSY

    def __init__(self, message: str, users: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.users = users


class BackupNotFound(ThinpoolError, FileNotFoundError):
    """No metadata backup of that name."""

    os_errno = errno.ENOENT


class BackupHeld(ThinpoolError, OSError):
    """What was asked for would take from a held metadata backup what it names: drop it first."""

    os_errno = errno.EBUSY


class BadReference(ThinpoolError, ValueError):
    """Not the name of an image."""


class ContainerNotFound(ThinpoolError, KeyError):
    """No container of that name."""


class RegistryError(ThinpoolError, OSError):
    """A registry cannot be reached, refused, or does not keep to its protocol; ``status``: of its HTTP answer (0: none)."""

    os_errno = errno.EREMOTEIO

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ToolFailed(ThinpoolError, OSError):
    """A program of the host, or the kernel, refused what was asked of it."""

    os_errno = errno.EIO


class ServerError(ThinpoolError, ConnectionError):
    """The pool's server cannot be reached, or failed."""

    os_errno = errno.ECONNREFUSED
