"""Who uses a device or a file system: for messages that say why something is busy."""

from __future__ import annotations

import os
from pathlib import Path


def holders(device: str) -> tuple[str, ...]:
    """The processes that have a block device or a partition of it open, or something on its file system, or see it mounted in a mount namespace of
    their own, as ``"bash (pid 4242)"``. Those that may not be looked at are left out.

    Nothing is opened or looked at but the kernel's own tables: a stat of what others have open would wait on file systems
    whose servers are gone.
    """
    number = f"{os.major(os.stat(device).st_rdev)}:{os.minor(os.stat(device).st_rdev)}"
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _uses(entry.path, device, number):
            found.append(f"{_command(entry.path)} (pid {entry.name})")
    return tuple(found)


def times_open_here(device: str) -> int:
    """How often this process has a block device, or a partition of it, open."""
    return sum(_leads_to(entry.path, device, []) for entry in os.scandir("/proc/self/fd"))


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


def _uses(process: str, device: str, number: str) -> bool:
    try:
        mountpoints = _mountpoints(process, number)
        if mountpoints and os.readlink(f"{process}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            return True
        links = [f"{process}/{name}" for name in ("cwd", "root", "exe")] + [entry.path for entry in os.scandir(f"{process}/fd")]
    except OSError:
        return False
    return any(_leads_to(link, device, mountpoints) for link in links)


def _mountpoints(process: str, number: str) -> list[str]:
    """Where a process sees the device mounted (proc(5), ``/proc/pid/mountinfo``; spaces are written as octal there)."""
    lines = Path(process, "mountinfo").read_text(errors="replace").splitlines()
    fields = [line.split() for line in lines]
    return [field[4].encode().decode("unicode_escape") for field in fields if field[2] == number]


def _leads_to(link: str, device: str, mountpoints: list[str]) -> bool:
    try:
        path = os.readlink(link)
    except OSError:
        return False
    return path == device or path.startswith(f"{device}p") or any(path == mountpoint or path.startswith(f"{mountpoint}/") for mountpoint in mountpoints)
