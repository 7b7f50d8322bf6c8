"""Mounting a layer's file system from its block device, and unmounting it."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from ..errors import LayerBusy, LayerState, ToolFailed
from .holders import describe, holders
from .keeping.takedown import device_number, mount, mount_table, umount

if TYPE_CHECKING:
    from ..layer import Layer

_MS_RDONLY, _MS_NOATIME = 1, 1024  # include/uapi/linux/mount.h
_PATIENCE_SECONDS = 2.0

# By type: where its magic number is (ext4: fs/ext4/ext4.h, s_magic; XFS: fs/xfs/libxfs/xfs_format.h, sb_magicnum), and mount
# options. Deleting files gives space back (discard); reading them does not write their atime, so that thin layers stay
# thin. A clone has its origin's UUID, which XFS would refuse to mount twice. A sealed layer's journal cannot be replayed.
_MAGIC = {"ext4": (1024 + 0x38, b"\x53\xef"), "xfs": (0, b"XFSB")}
_OPTIONS = {"ext4": "discard", "xfs": "nouuid,discard"}
_SEALED_OPTIONS = {"ext4": "noload", "xfs": "nouuid,norecovery"}


def filesystem_of(layer: Layer) -> str:
    """``"ext4"`` (also for ext2 and ext3) or ``"xfs"``. Raises :class:`~thinpool.errors.LayerState` for anything else."""
    for name, (offset, magic) in _MAGIC.items():
        if layer.size >= offset + len(magic) and layer.pread(len(magic), offset) == magic:
            return name
    raise LayerState(f"layer {layer.name!r} holds no ext4 or XFS file system; attach it and make one first")


def mount_filesystem(layer: Layer, device: str, directory: str, read_only: bool) -> None:
    """Mount the file system on ``device``, which is ``layer``'s.

    A sealed layer is mounted as it is: what its file system had only in the journal when it was sealed is not seen; a
    clone, mounted, has it. Raises LayerState where there is no file system, ToolFailed where the kernel refuses.
    """
    filesystem = filesystem_of(layer)
    options = (_SEALED_OPTIONS if layer.sealed else _OPTIONS)[filesystem]
    try:
        mount(device, directory, filesystem, _MS_NOATIME | (_MS_RDONLY if read_only else 0), options)
    except OSError as error:
        raise ToolFailed(f"cannot mount layer {layer.name!r} ({filesystem}) on {directory}: {error.strerror}; the kernel's log may say more") from error


def unmount_filesystem(directory: str, device: str) -> None:
    """Unmount it; nothing to do where somebody has done so already.

    Raises :class:`~thinpool.errors.LayerBusy` naming who uses it, or when something else is mounted over it.
    """
    number = device_number(device)
    there = [entry for entry in mount_table() if entry.mountpoint == directory]
    if all(entry.device_number != number for entry in there):
        return
    if there[-1].device_number != number:
        raise LayerBusy(f"{there[-1].source} is mounted over {directory}: unmount that first")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            umount(directory)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise ToolFailed(f"cannot unmount {directory}: {error.strerror}") from error
        if time.monotonic() > deadline:
            users = holders(device)
            raise LayerBusy(f"{directory} is in use{describe(users)}: end that first", users)
        time.sleep(0.02)
