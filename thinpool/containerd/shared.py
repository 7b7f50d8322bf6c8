"""A file system of a running container for those who want to read it meanwhile.

containerd mounts a snapshot read-only to see what is new in it (``docker commit``, ``nerdctl commit``), but the kernel does not mount one device both
ways. Bind mounts can be read-only, whatever they are of. So who asks for a snapshot that is mounted already is told to bind a mount of our own,
``run/shared/ID`` in the pool's directory; unlike the container's, that one cannot be gone before he comes to it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..api import LayerAPI, PoolAPI
from ..exports.keeping.takedown import attempt, device_number, mount, mount_table, umount

_MS_NOATIME = 1024  # include/uapi/linux/mount.h


def others_mountpoint(pool: PoolAPI, device: str) -> str | None:
    """Where a device is mounted, but for our own mount of it; ``None``: nowhere that is seen from here."""
    number, ours = device_number(device), str(_directory(pool))
    return next((one.mountpoint for one in mount_table() if one.device_number == number and os.path.dirname(one.mountpoint) != ours), None)


def share(pool: PoolAPI, layer: LayerAPI, device: str, filesystem: str) -> str:
    """Our own mount of a device that is mounted. Raises OSError."""
    place = _directory(pool) / str(layer.id)
    if not _is_mounted(place):
        place.mkdir(parents=True, exist_ok=True)
        mount(device, str(place), filesystem, _MS_NOATIME, "nouuid" if filesystem == "xfs" else "")
    return str(place)


def end_share(pool: PoolAPI, layer: LayerAPI) -> None:
    """Takes our own mount away, if there is one; bind mounts of it stay."""
    _end(_directory(pool) / str(layer.id))


def end_unused_shares(pool: PoolAPI) -> None:
    """Takes away our own mounts of what nobody else has mounted any more."""
    with suppress(FileNotFoundError):
        for place in _directory(pool).iterdir():
            number = next((one.device_number for one in mount_table() if one.mountpoint == str(place)), None)
            if sum(one.device_number == number for one in mount_table()) <= 1:
                _end(place)


def _directory(pool: PoolAPI) -> Path:
    return Path(os.path.realpath(pool.path)) / "run" / "shared"


def _is_mounted(place: Path) -> bool:
    return any(one.mountpoint == str(place) for one in mount_table())


def _end(place: Path) -> None:
    if place.exists():
        attempt(umount, str(place))
        attempt(os.rmdir, place)
