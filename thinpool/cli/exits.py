"""Exit codes, and how an exception becomes one and a line on standard error.

====  ==========================================================================
code  meaning
====  ==========================================================================
0     done
1     failed, for a reason without a code of its own
2     used wrongly: an unknown option, a size, a name, an image's name or an address that cannot be, what must be UTF-8 and is not
3     not found: the pool, the layer, the image, the container, a file
4     in the way: exists already, busy, needed by a container, sealed, the wrong kind of layer
5     no space: the pool's capacity, a layer's quota, or the host's disk
6     damaged: a record, the data file, an unknown format, a failing disk
7     needs root, or a permission
125   ``run`` and ``container start`` only: the command could not be run, used wrongly too (the command's status otherwise)
130   interrupted
====  ==========================================================================

``check`` has the codes of ``qemu-img check`` instead: 0 nothing found, 1 it could not be done (used wrongly too), 2 corruption,
3 leaks only.
"""

from __future__ import annotations

from .. import errors

FAILED, USAGE, NOT_FOUND, IN_THE_WAY, NO_SPACE, DAMAGED, NEEDS_ROOT, NOT_RUN, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 125, 130

# The first that fits counts.
_CODES: list[tuple[type[BaseException], int]] = [
    (errors.BadSize, USAGE),
    (errors.BadName, USAGE),
    (errors.BadAddress, USAGE),
    (errors.OutOfRange, USAGE),
    (errors.BadReference, USAGE),
    (UnicodeEncodeError, USAGE),
    (errors.ImageNotFound, NOT_FOUND),
    (errors.ContainerNotFound, NOT_FOUND),
    (errors.BackupNotFound, NOT_FOUND),
    (errors.ImageBusy, IN_THE_WAY),
    (errors.BackupHeld, IN_THE_WAY),
    (errors.PoolNotFound, NOT_FOUND),
    (errors.LayerNotFound, NOT_FOUND),
    (errors.LayerDeleted, NOT_FOUND),
    (errors.PoolExists, IN_THE_WAY),
    (errors.PoolBusy, IN_THE_WAY),
    (errors.LayerExists, IN_THE_WAY),
    (errors.LayerBusy, IN_THE_WAY),
    (errors.LayerSealed, IN_THE_WAY),
    (errors.LayerState, IN_THE_WAY),
    (errors.OutOfSpace, NO_SPACE),
    (errors.DamagedError, DAMAGED),
    (errors.FormatError, DAMAGED),
    (errors.PoolFailed, DAMAGED),
    (errors.DiskError, DAMAGED),
    (errors.NeedsRoot, NEEDS_ROOT),
    (errors.ThinpoolError, FAILED),
    (FileNotFoundError, NOT_FOUND),
    (FileExistsError, IN_THE_WAY),
    (PermissionError, NEEDS_ROOT),
]


def code_of(error: BaseException) -> int:
    """The exit code of an exception."""
    if isinstance(error, OSError) and error.errno in errors.NO_SPACE_ERRNOS:
        return NO_SPACE
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


def is_expected(error: BaseException) -> bool:
    """Whether its message is all that there is to say; otherwise it is a bug of ours."""
    return isinstance(error, (errors.ThinpoolError, OSError, UnicodeEncodeError))


def message_of(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, OSError) and not isinstance(error, errors.ThinpoolError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError):  # of a name or a path, which Python has from bytes that are not UTF-8; or of what the terminal cannot show
        return f"cannot be put into {error.encoding.upper()}: {error.object!r}"
    text = " ".join(str(error).split())
    if is_expected(error):
        return text
    return f"internal error: {type(error).__name__}: {text} (set THINPOOL_DEBUG=1 for the traceback)"
