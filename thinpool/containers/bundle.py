"""OCI bundles: containers for crun and runc (OCI runtime-spec 1.0, "Configuration").

Defaults are those of Docker's containers, except that the network is the host's, as with the built-in namespaces.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..api import PoolAPI
from ..errors import ToolFailed

BUILT_IN = "builtin"
_RUNTIMES = ("crun", "runc")
# By number, as in capabilities(7).
_CAPABILITIES = {
    0: "CHOWN", 1: "DAC_OVERRIDE", 3: "FOWNER", 4: "FSETID", 5: "KILL", 6: "SETGID", 7: "SETUID", 8: "SETPCAP", 10: "NET_BIND_SERVICE", 13: "NET_RAW",
    18: "SYS_CHROOT", 27: "MKNOD", 29: "AUDIT_WRITE", 31: "SETFCAP",
}  # fmt: skip
_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug",
    "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_GROUP_SECONDS = 5.0
_QUIET = ("nosuid", "noexec", "nodev")


def find_runtime(name: str) -> str | None:
    """The program of that name or path; of the name "", the first one there is. ``None``: the built-in namespaces. Raises ToolFailed."""
    if name == BUILT_IN or (not name and _in_chroot()):
        return None
    for one in (name,) if name else _RUNTIMES:
        if (found := shutil.which(one)) is not None:
            return found
    if name:
        raise ToolFailed(f"there is no OCI runtime {name!r}: install it, or say --runtime {BUILT_IN}")
    return None


def _in_chroot() -> bool:
    """A root directory that is no mount point cannot be left for another, as runtimes do it."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return not any(line.split()[4] == "/" for line in mounts)


@contextmanager
def bundle(
    directory: Path, runtime: str, root: Path, command: Sequence[str], *, owner: str, hostname: str, workdir: str, terminal: bool
) -> Iterator[list[str]]:
    """Makes a bundle in ``directory`` and gives the words that run it; in the end nothing of it is left. Who runs it adds user and environment.

    ``owner``: the process whose end is that of the container, for :func:`owner_of`.
    """
    sweep(directory)
    directory.mkdir(mode=0o700, parents=True)
    name = f"thinpool-{uuid.uuid4().hex}"
    (directory / "config.json").write_text(json.dumps(_configuration(root, command, hostname, workdir, terminal=terminal)))
    (directory / "runtime").write_text(f"{runtime}\n{name}\n{owner}\n")
    try:
        yield [*_words(runtime, directory), "run", "--bundle", str(directory), name]
    finally:
        sweep(directory)


def bundle_directory(pool: PoolAPI, mountpoint: str | Path) -> Path:
    """Where the bundle of the container that is mounted there is made; all bundles are side by side."""
    return pool.path / "run" / "bundles" / Path(mountpoint).name


def owner_of(directory: Path) -> str:
    """Who has made the bundle; "": nobody who could be asked."""
    try:
        return (directory / "runtime").read_text().split("\n")[2]
    except (OSError, IndexError):
        return ""


def sweep(directory: Path) -> None:
    """Removes a bundle, and what its runtime still knows of the container: all of its processes have ended."""
    with suppress(OSError, ValueError):
        runtime, name, _ = (directory / "runtime").read_text().split("\n", 2)
        if (directory / "state" / name).exists():
            subprocess.run([*_words(runtime, directory), "delete", "--force", name], check=False, capture_output=True)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if " - cgroup2 " in line:  # a group that runc has made where it now does not look (container_init.py, init)
                _remove_group(f"{line.split()[4]}/{name}")
    shutil.rmtree(directory, ignore_errors=True)


def _remove_group(path: str) -> None:
    """Removes a control group, if it is there: it is busy for as long as the kernel has not done with its last process."""
    deadline = time.monotonic() + _GROUP_SECONDS
    while True:
        try:
            return os.rmdir(path)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                return None
        time.sleep(0.01)


def _words(runtime: str, directory: Path) -> list[str]:
    # No resource of a container is limited, so it needs no control group. runc makes one all the same.
    without = ["--cgroup-manager=disabled"] if Path(runtime).name == "crun" else []
    return [runtime, *without, "--root", str(directory / "state")]


def _configuration(root: Path, command: Sequence[str], hostname: str, workdir: str, *, terminal: bool) -> Mapping[str, Any]:
    bounding = next(int(line.split()[1], 16) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd:"))
    capabilities = [f"CAP_{name}" for number, name in _CAPABILITIES.items() if bounding >> number & 1]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root)},
        "hostname": hostname,
        "process": {
            "terminal": terminal,
            "args": list(command),
            "cwd": workdir,
            "user": {"uid": 0, "gid": 0},
            "env": [],
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "mounts": [
            _mount("/proc", "proc", *_QUIET),
            _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=64k"),
            _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            _mount("/dev/shm", "tmpfs", *_QUIET, "mode=1777"),
            _mount("/dev/mqueue", "mqueue", *_QUIET),
            _mount("/sys", "sysfs", *_QUIET, "ro"),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
        },
    }


def _mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}
