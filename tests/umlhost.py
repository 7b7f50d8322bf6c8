"""Another kernel to test on: user-mode Linux (Debian's ``user-mode-linux``), an ordinary process that boots in about three seconds.

It has what a host's kernel may lack (nbd, dm-thin, dm-log-writes, dm-flakey, dm-dust), and crashes alone. Its root is the host's
``/`` over hostfs, read-only: all programs of the host are there, and this repository with its ``.venv``. ``/mnt`` is a tmpfs of its own,
where scripts start; pools belong there or on a disk, for hostfs has neither sockets nor shared mappings. One processor, no network but the loopback.

:func:`run` is all there is to it. ``guesttests`` runs whole test files in there.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import preloads

HOST = "/mnt/host"
_MODULES = Path("/usr/lib/uml/modules")
_BOOT_SECONDS = 60.0

_INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/mnt TMPDIR=/mnt
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /mnt
mkdir /mnt/uml {host}
hostfs() {{ mount -t hostfs -o "hostfs=$1" host "$2" 2>/dev/null || mount -t hostfs -o "$1" host "$2"; }}  # Linux 6.12, and 6.1
hostfs {files} /mnt/uml
hostfs {directory} {host}
(sleep {seconds}; busybox poweroff -f) &
busybox ifconfig lo 127.0.0.1 up
cd /mnt
{{
    for module in {modules}; do busybox insmod $module; done
    sh /mnt/uml/script </dev/null
    echo $? >/mnt/uml/status
}} >/mnt/uml/output 2>&1
busybox poweroff -f
"""


@dataclass(frozen=True)
class Ended:
    """How a script ended. ``status``: its exit code, ``None`` where it came to none (time was up, or the kernel crashed); ``console``: what the kernel said."""

    status: int | None
    output: str
    console: str


def run(
    script: str,
    *,
    modules: Sequence[str] = (),
    directory: Path | None = None,
    disks: Sequence[Path] = (),
    cut: Callable[[], bool] | None = None,
    memory: str = "512M",
    seconds: float = 60.0,
) -> Ended:
    """Boots, runs a shell script as root, and powers off. Nothing is left of the guest, whatever happens.

    ``modules``: kernel modules to load first, like ``nbd``; what they need comes by itself. ``directory``: one of the host that the
    script may write to, as :data:`HOST`. ``disks``: files that are ``/dev/ubda``, ``/dev/ubdb``, …; what the guest flushes is in the file,
    what its kernel has not written is lost with it. ``cut``: the guest is killed once this holds. ``seconds``: how long the script may take.
    """
    with tempfile.TemporaryDirectory(prefix="uml-") as place:
        files = Path(place)
        (files / "script").write_text(script)
        words = {"host": HOST, "files": place, "directory": str(directory or place), "seconds": str(seconds)}
        (files / "init").write_text(_INIT.format(**words, modules=shlex.join(_with_needed(modules))))
        (files / "init").chmod(0o755)
        kernel = f"linux.uml mem={memory} rootfstype=hostfs rootflags=/ ro quiet init={place}/init con=null con0=null,fd:1 uml_dir={place} umid=guest"
        environment = {**os.environ, "LD_PRELOAD": str(preloads.build("uml_ptrace", files))}
        ubds = [f"ubd{number}={disk}" for number, disk in enumerate(disks)]
        with (files / "console").open("wb") as console:
            guest = subprocess.Popen(
                [*kernel.split(), *ubds], env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
            try:
                _wait(guest, seconds + _BOOT_SECONDS, cut)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(guest.pid, signal.SIGKILL)  # its processes are processes here
                guest.wait()
        status, output, log = (_text(files / name) for name in ("status", "output", "console"))
        return Ended(int(status) if status else None, output, log)


def _wait(guest: subprocess.Popen[bytes], seconds: float, cut: Callable[[], bool] | None) -> None:
    """Returns when the guest has ended, time is up or ``cut`` holds."""
    deadline = time.monotonic() + seconds
    while guest.poll() is None and time.monotonic() < deadline and not (cut and cut()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            guest.wait(0.01 if cut else seconds)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _with_needed(modules: Sequence[str]) -> list[str]:
    """The files of kernel modules, each after those that it needs (modules.dep(5) names these in the order to unload them)."""
    (tree,) = _MODULES.iterdir()
    needed = {Path(file).stem: [file, *others.split()] for file, _, others in (line.partition(":") for line in (tree / "modules.dep").open())}
    files = [str(tree / file) for name in modules for file in reversed(needed[name])]
    return list(dict.fromkeys(files))
