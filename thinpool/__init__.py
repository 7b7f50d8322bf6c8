"""thinpool: a block-level thin-provisioning engine in user space.

A pool is a directory. Layers in it share chunks copy-on-write: snapshots and clones take no time and no space,
whatever their size. :class:`Pool` opens one in this process; :func:`connect` goes through the pool's server where one
runs. ``docs/library.md`` is the tour; :mod:`thinpool.errors` draws the exceptions.
"""

from .api import Attachment, Extent, LayerAPI, PoolAPI, PoolUsage, Usage
from .errors import (
    BadName,
    BadSize,
    DamagedError,
    DiskError,
    FormatError,
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
    ServerError,
    ThinpoolError,
    ToolFailed,
)
from .exports import Uses
from .exports.raw import export_raw, import_raw
from .filesystems.rootfs import import_rootfs
from .layer import Layer
from .pool import Pool
from .server.connect import connect

Pool.register_uses(Uses)
Pool.register_transfers(import_raw=import_raw, export_raw=export_raw, import_rootfs=import_rootfs)

__version__ = "0.1.0"
__all__ = [
    "Attachment",
    "BadName",
    "BadSize",
    "DamagedError",
    "DiskError",
    "Extent",
    "FormatError",
    "ImportFailed",
    "Layer",
    "LayerAPI",
    "LayerBusy",
    "LayerDeleted",
    "LayerExists",
    "LayerNotFound",
    "LayerSealed",
    "LayerState",
    "NeedsRoot",
    "OutOfRange",
    "OutOfSpace",
    "Pool",
    "PoolAPI",
    "PoolBusy",
    "PoolClosed",
    "PoolExists",
    "PoolFailed",
    "PoolNotFound",
    "PoolReadOnly",
    "PoolUsage",
    "ServerError",
    "ThinpoolError",
    "ToolFailed",
    "Usage",
    "connect",
]
