"""What the kernel holds for a pool, and taking it down, also after the pool's process has died.

All of it hangs on the pool's run directory: the FUSE mount ``layers``, loop and nbd devices whose backing file lies in it, and
mounts of those devices. So it is found by looking, nothing has to be remembered, and nothing that is not the pool's can be
met: :func:`take_down` is what the keeper does after a ``kill -9``, and what a new process does about its predecessor.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import netlink

MNT_FORCE = 1  # include/linux/fs.h; for FUSE: end the connection, so that nobody waits for an answer any more
MNT_DETACH = 2
_LOOP_CLR_FD = 0x4C01  # include/uapi/linux/loop.h
_NBD_DISCONNECT, NBD_INDEX = 2, 1  # include/uapi/linux/nbd-netlink.h

_NBD = "/dev/nbd"

TREE_TYPE = "fuse.thinpool"
_libc = ctypes.CDLL(None, use_errno=True)  # its calls let go of the GIL: the kernel may be asking our FUSE threads


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of ``/proc/self/mountinfo``: device number as ``"major:minor"``, mount point, type and source."""

    device_number: str
    mountpoint: str
    filesystem: str
    source: str


def mount(source: str, target: str, filesystem: str, flags: int, data: str) -> None:
    """mount(2). Raises OSError."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), filesystem.encode(), ctypes.c_ulong(flags), data.encode()), target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2). Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def _check(result: int, path: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def mount_table() -> list[MountEntry]:
    """All mounts of this mount namespace, in the order they were made (proc(5), mountinfo)."""
    entries = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        rest = fields[fields.index("-", 6) + 1 :]
        entries.append(MountEntry(fields[2], _unescape(fields[4]), rest[0], _unescape(rest[1])))
    return entries


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def devices() -> dict[str, str]:
    """Backing file of each loop device in use, and what nbd devices were given in its place, by device number (``"7:0"``)."""
    found = {}
    for pattern, file in (("loop*", "loop/backing_file"), ("nbd*", "backend")):
        for directory in Path("/sys/block").glob(pattern):
            try:
                backing = (directory / file).read_text(errors="surrogateescape").rstrip("\n")
                found[(directory / "dev").read_text().strip()] = backing
            except OSError:
                continue  # not in use, or just let go
    return found


def device_number(path: str) -> str:
    """``"7:3"`` for ``/dev/loop3``."""
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def device_path(device_number: str) -> str:
    """``/dev/loop3`` for ``"7:3"``."""
    return "/dev/" + os.path.basename(os.path.realpath(f"/sys/dev/block/{device_number}"))


def is_nbd(device: str) -> bool:
    """Whether it is an nbd device, not a loop device."""
    return device.startswith(_NBD)


def nbd_index(device: str) -> bytes:
    """The number in ``/dev/nbd3``, as the kernel is told it."""
    return struct.pack("=I", int(device.removeprefix(_NBD)))


def backing_file(device_number: str, run_directory: str) -> str | None:
    """The file in the pool's tree that a device is on; ``None``: it is not in use, or not this pool's."""
    file = devices().get(device_number, "")
    return file if file.startswith(os.path.join(run_directory, "layers", "")) else None


def take_down(run_directory: str) -> None:
    """Unmount, detach and remove all that hangs on a pool's run directory, whether or not anybody uses it still.

    What is in use goes as soon as its last user does; nobody new finds it. Does nothing where there is nothing.
    """
    take_down_tree(run_directory)
    for number in devices():
        take_down_orphan(number, run_directory)


def take_down_tree(run_directory: str) -> None:
    """The FUSE tree, and the loop devices that hang on it."""
    tree = os.path.join(run_directory, "layers")
    if _is_tree_mounted(tree):
        attempt(umount, tree, MNT_FORCE)  # its server is gone: nobody shall wait for it
    for number in devices():
        if not is_nbd(device_path(number)):
            take_down_device(number, run_directory)
    while _is_tree_mounted(tree):
        if not _unmount_somehow(tree):
            break


def take_down_orphan(number: str, run_directory: str) -> None:
    """The same as :func:`take_down_device`, for a device that nobody serves."""
    device = device_path(number)
    if is_nbd(device) and backing_file(number, run_directory) is not None:
        attempt(let_go, device)  # nobody shall wait for its server
    take_down_device(number, run_directory)


def take_down_device(number: str, run_directory: str) -> None:
    """Unmount what is mounted from one device and let go of it, if it is the pool's."""
    if backing_file(number, run_directory) is None:
        return
    for entry in reversed(mount_table()):
        if entry.device_number == number:
            _unmount_somehow(entry.mountpoint)
            remove_mountpoint(run_directory, entry.mountpoint)
    attempt(let_go, device_path(number))


def _is_tree_mounted(tree: str) -> bool:
    return any(entry.mountpoint == tree and entry.filesystem == TREE_TYPE for entry in mount_table())


def remove_mountpoint(run_directory: str, mountpoint: str) -> None:
    """Remove a mount point that lies in the run directory: those were made for one mount. Others are the user's."""
    if os.path.dirname(mountpoint) == os.path.join(run_directory, "containers"):
        attempt(os.rmdir, mountpoint)


def _unmount_somehow(mountpoint: str) -> bool:
    for wait_seconds in (0.0, 0.05, 0.2):  # whoever is ending may need a moment
        time.sleep(wait_seconds)
        if attempt(umount, mountpoint):
            return True
    return attempt(umount, mountpoint, MNT_DETACH)


def let_go(device: str) -> None:
    """Take what is behind a device off it: from a loop device that others have open, when the last one closes it; from an nbd device, at once."""
    if is_nbd(device):
        netlink.ask("nbd", _NBD_DISCONNECT, {NBD_INDEX: nbd_index(device)})
        return
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _LOOP_CLR_FD)
    finally:
        os.close(descriptor)


def attempt(call: Callable[..., object], *arguments: object) -> bool:
    """Do what may be impossible or done already; false if it was."""
    try:
        call(*arguments)
    except OSError:
        return False
    return True
