"""What the kernel holds for a pool, and taking it down, also after the pool's process has died.

All of it hangs on the pool's run directory: the FUSE mount ``layers``, loop devices whose backing file lies in it, and
mounts of those devices. So it is found by looking, nothing has to be remembered, and nothing that is not the pool's can be
met: :func:`take_down` is what the keeper does after a ``kill -9``, and what a new process does about its predecessor.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MNT_FORCE = 1  # include/linux/fs.h; for FUSE: end the connection, so that nobody waits for an answer any more
MNT_DETACH = 2
LOOP_CLR_FD = 0x4C01  # include/uapi/linux/loop.h

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


def loop_devices() -> dict[str, str]:
    """Backing file of each loop device in use, by device number (``"7:0"``)."""
    found = {}
    for directory in Path("/sys/block").glob("loop*"):
        try:
            backing = (directory / "loop/backing_file").read_text(errors="surrogateescape").rstrip("\n")
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


def backing_file(device_number: str, run_directory: str) -> str | None:
    """The file in the pool's tree that a loop device is on; ``None``: it is not in use, or not this pool's."""
    file = loop_devices().get(device_number, "")
    return file if file.startswith(os.path.join(run_directory, "layers", "")) else None


def take_down(run_directory: str) -> None:
    """Unmount, detach and remove all that hangs on a pool's run directory, whether or not anybody uses it still.

    What is in use goes as soon as its last user does; nobody new finds it. Does nothing where there is nothing.
    """
    tree = os.path.join(run_directory, "layers")
    if _is_tree_mounted(tree):
        attempt(umount, tree, MNT_FORCE)  # its server is gone: nobody shall wait for it
    for number in loop_devices():
        take_down_device(number, run_directory)
    while _is_tree_mounted(tree):
        if not _unmount_somehow(tree):
            break


def take_down_device(number: str, run_directory: str) -> None:
    """Unmount what is mounted from one loop device and let go of it, if it is the pool's."""
    if backing_file(number, run_directory) is None:
        return
    for entry in reversed(mount_table()):
        if entry.device_number == number:
            _unmount_somehow(entry.mountpoint)
            remove_mountpoint(run_directory, entry.mountpoint)
    attempt(_clear_loop, device_path(number))


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


def _clear_loop(device: str) -> None:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, LOOP_CLR_FD)  # while others have it open: done when the last one closes it
    finally:
        os.close(descriptor)


def attempt(call: Callable[..., object], *arguments: object) -> bool:
    """Do what may be impossible or done already; false if it was."""
    try:
        call(*arguments)
    except OSError:
        return False
    return True
