"""Who uses a device or a file system: for messages that say why something is busy."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def holders(device_number: int) -> tuple[str, ...]:
    """The processes that have a block device open, or something on its file system, or see it mounted in a mount namespace of
    their own, as ``"bash (pid 4242)"``. Those that may not be looked at are left out."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _uses(entry.path, device_number):
            found.append(f"{_command(entry.path)} (pid {entry.name})")
    return tuple(found)


def describe(users: tuple[str, ...]) -> str:
    """`` by a, b and 3 more``, or nothing where nobody was found."""
    if not users:
        return ""
    shown = ", ".join(users[:3])
    return f" by {shown}" + (f" and {len(users) - 3} more" if len(users) > 3 else "")


def _command(process: str) -> str:
    try:
        return Path(process, "comm").read_text().strip()
    except OSError:
        return "?"


def _uses(process: str, device_number: int) -> bool:
    if any(_is_on(f"{process}/{name}", device_number) for name in ("cwd", "root", "exe")):
        return True
    try:
        if any(_is_on(entry.path, device_number) for entry in os.scandir(f"{process}/fd")):
            return True
        if os.readlink(f"{process}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
            return False
        number = f" {os.major(device_number)}:{os.minor(device_number)} "
        return number in Path(process, "mountinfo").read_text(errors="replace")
    except OSError:
        return False


def _is_on(path: str, device_number: int) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_dev == device_number or (stat.S_ISBLK(status.st_mode) and status.st_rdev == device_number)
