"""thinpool: a block-level thin-provisioning engine in user space.

A pool is a directory. Layers in it share chunks copy-on-write: snapshots and clones take no time and no space,
whatever their size. :class:`Pool` opens one in this process; :func:`connect` goes through the pool's server where one
runs. ``docs/library.md`` is the tour; :mod:`thinpool.errors` draws the exceptions.
"""

from .api import (
    Attachment,
    Change,
    Container,
    ContainersAPI,
    Credentials,
    Extent,
    HistoryEntry,
    Image,
    ImagesAPI,
    LayerAPI,
    PoolAPI,
    PoolUsage,
    Removed,
    Usage,
)
from .containers.containers import Containers
from .errors import (
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
from .exports import Uses
from .exports.raw import export_raw, import_raw
from .filesystems.rootfs import import_rootfs
from .images.images import Images
from .layer import Layer
from .pool import Pool
from .server.connect import connect

Pool.register(make_uses=Uses, make_images=Images, make_containers=Containers, import_raw=import_raw, export_raw=export_raw, import_rootfs=import_rootfs)

__version__ = "0.1.0"
__all__ = [
    "Attachment",
    "BadName",
    "BadReference",
    "BadSize",
    "Change",
    "Container",
    "ContainerNotFound",
    "ContainersAPI",
    "Credentials",
    "DamagedError",
    "DiskError",
    "Extent",
    "FormatError",
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
    "RegistryError",
    "Removed",
    "ServerError",
    "ThinpoolError",
    "ToolFailed",
    "Usage",
    "connect",
]
