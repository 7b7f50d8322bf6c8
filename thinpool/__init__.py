"""thinpool: a block-level thin-provisioning engine in user space.

A pool is a directory. Layers in it share chunks copy-on-write: snapshots and clones take no time and no space,
whatever their size. :class:`Pool` opens one in this process; :func:`connect` goes through the pool's server where one
runs. ``docs/library.md`` is the tour; :mod:`thinpool.errors` draws the exceptions.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .api import (
    Attachment,
    Backup,
    Change,
    Compacted,
    Container,
    ContainersAPI,
    Credentials,
    Event,
    Extent,
    Healed,
    HistoryEntry,
    Image,
    ImagesAPI,
    LayerAPI,
    Limits,
    Policy,
    PoolAPI,
    PoolUsage,
    Range,
    Removed,
    Sparsified,
    Usage,
)
from .deltas import Delta, delta
from .errors import (
    BackupHeld,
    BackupNotFound,
    BadAddress,
    BadName,
    BadReference,
    BadSize,
    ContainerNotFound,
    DamagedError,
    DiskError,
    FormatError,
    ImageBusy,
    ImageNotFound,
    ImportFailed,
    LayerBusy,
    LayerDeleted,
    LayerExists,
    LayerNotFound,
    LayerSealed,
    LayerState,
    NeedsRoot,
    OutOfRange,
    OutOfSpace,
    PoolBusy,
    PoolClosed,
    PoolExists,
    PoolFailed,
    PoolNotFound,
    PoolReadOnly,
    RegistryError,
    ServerError,
    ThinpoolError,
    ToolFailed,
)
from .layer import Layer
from .metrics import PoolMetrics
from .pool import Pool
from .server.connect import connect


def _later(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(f".{module}", __name__), name)(*args, **options)

    return call


# What a library logs is for the program to show, or not.
logging.getLogger("thinpool").addHandler(logging.NullHandler())

# What is done with layers, loaded by the first who asks for it: most commands need little of it, and should start at once.
Pool.register(
    make_uses=_later("exports", "Uses"),
    make_images=_later("images.images", "Images"),
    make_containers=_later("containers.containers", "Containers"),
    import_raw=_later("exports.raw", "import_raw"),
    export_raw=_later("exports.raw", "export_raw"),
    import_rootfs=_later("filesystems.rootfs", "import_rootfs"),
    heal=_later("healing", "heal"),
)

__version__ = "0.1.0"
__all__ = [
    "Attachment",
    "Backup",
    "BackupHeld",
    "BackupNotFound",
    "BadAddress",
    "BadName",
    "BadReference",
    "BadSize",
    "Change",
    "Compacted",
    "Container",
    "ContainerNotFound",
    "ContainersAPI",
    "Credentials",
    "DamagedError",
    "Delta",
    "DiskError",
    "Event",
    "Extent",
    "FormatError",
    "Healed",
    "HistoryEntry",
    "Image",
    "ImageBusy",
    "ImageNotFound",
    "ImagesAPI",
    "ImportFailed",
    "Layer",
    "LayerAPI",
    "LayerBusy",
    "LayerDeleted",
    "LayerExists",
    "LayerNotFound",
    "LayerSealed",
    "LayerState",
    "Limits",
    "NeedsRoot",
    "OutOfRange",
    "OutOfSpace",
    "Policy",
    "Pool",
    "PoolAPI",
    "PoolBusy",
    "PoolClosed",
    "PoolExists",
    "PoolFailed",
    "PoolMetrics",
    "PoolNotFound",
    "PoolReadOnly",
    "PoolUsage",
    "Range",
    "RegistryError",
    "Removed",
    "ServerError",
    "Sparsified",
    "ThinpoolError",
    "ToolFailed",
    "Usage",
    "connect",
    "delta",
]
