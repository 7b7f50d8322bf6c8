"""What the data plane's error codes mean: one table from code to exception.

A fault is made of the detail that the core keeps of an error (``tp_error_info``) and of words for layer and range.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from . import errors


def _corrupt(info: Any, where: str) -> errors.ThinpoolError:
    if not info.kind:
        return errors.DamagedError(f"the data file is shorter than the pool's maps say: it was cut off{where}")
    kinds = {1: "map node", 2: "chunk count page", 3: "node count page", 4: "free space summary", 5: "layer map", 6: "pool state", 11: "checksums"}
    return errors.DamagedError(f"damaged metadata: {kinds[info.kind]} {info.key} does not match its checksum{where}")


def _checksum(info: Any, where: str) -> errors.ThinpoolError:
    return errors.DamagedError(f"damaged data: chunk {info.key} does not match its checksum{where}: heal it by thinpool repair --heal-from")


def _disk(info: Any, where: str) -> errors.ThinpoolError:
    return errors.DiskError(f"the host's disk failed: {os.strerror(info.os_error)}{where}", info.os_error or errno.EIO)


def _space(info: Any, where: str) -> errors.ThinpoolError:
    kinds = {
        0: "the pool's capacity is used up",
        errno.EDQUOT: "a quota on the host's disk is used up",
        errno.EFBIG: "the data file may not become larger, by the host's file system or this process's limits",
    }
    what = kinds.get(info.os_error, "the host's disk is full")
    return errors.OutOfSpace(f"{what}{where}: remove layers, or raise the {'quota' if info.os_error == errno.EDQUOT else 'capacity'}")


def _range(info: Any, where: str) -> errors.ThinpoolError:
    return errors.OutOfRange(f"past the end of the layer{where}")


def _simple(kind: type[errors.ThinpoolError], message: str) -> Callable[[Any, str], errors.ThinpoolError]:
    return lambda info, where: kind(message + where)


FAULTS: dict[str, Callable[[Any, str], errors.ThinpoolError]] = {
    "TP_EIO": _disk,
    "TP_ENOSPC": _space,
    "TP_EQUOTA": _simple(errors.OutOfSpace, "the layer's quota is used up: raise it, or discard what is not needed"),
    "TP_ERANGE": _range,
    "TP_ESEALED": _simple(errors.LayerSealed, "a sealed layer never changes; clone it and write to the clone"),
    "TP_EDELETED": _simple(errors.LayerDeleted, "the layer was deleted"),
    "TP_ECLOSED": _simple(errors.PoolClosed, "the pool is closed"),
    "TP_ECORRUPT": _corrupt,
    "TP_ECHECKSUM": _checksum,
    "TP_ENOMEM": _simple(errors.DiskError, "out of memory"),
    "TP_EFAILED": _simple(errors.PoolFailed, "the pool is in error mode after a failed sync or commit: reads go on, open it anew to write"),
    "TP_EREADONLY": _simple(errors.PoolReadOnly, "the pool is open read-only"),
    "TP_EINVAL": _simple(errors.BadSize, "a size or argument that the engine cannot take"),
    "TP_ENOENT": _simple(errors.DamagedError, "a layer has no map record"),
    "TP_ECALLBACK": _simple(errors.DiskError, "the metadata store failed"),
}
