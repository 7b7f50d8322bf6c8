"""Runs a command in a container: a clone of a layer as root directory, in namespaces of its own.

The command runs under ``container_init.py``, a process of its own that knows nothing of pools. The mount belongs to
this process as its owner: should it be killed, its container's processes die with it, and whoever holds the pool
takes the mount down.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..api import LayerAPI, PoolAPI, Size
from ..errors import BadName, LayerBusy, LayerState, NeedsRoot, ThinpoolError
from ..filesystems.blank import FILESYSTEM_LABEL, grow_ext4, grow_xfs

CONTAINER_LABEL = "thinpool.container"
IMAGE_LABEL = "thinpool.image"
_REMOVE_LABEL = "thinpool.remove"  # the pid and start time of the process that will delete the layer when its command ends
_INIT = Path(__file__).with_name("container_init.py")
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_NAME_MAX = 255  # bytes of a file name, as on every file system of Linux
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


def run_container(
    pool: PoolAPI,
    layer_name: str,
    command: Sequence[str],
    *,
    name: str | None = None,
    remove: bool = False,
    size: Size | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Clones the layer, mounts the clone, runs the command with it as its root; the command's exit status.

    128 and the signal's number where a signal ended it, 127 where there is no such command, 126 where it cannot be run. The clone is
    named ``name`` (by default after the layer) and kept, unless ``remove``. ``size``: a larger one for it, its file system is grown.
    Raises NeedsRoot, LayerNotFound, LayerExists, LayerState or ToolFailed.
    """
    if os.geteuid() != 0:
        raise NeedsRoot("running a container needs root, for its mount and namespaces; clone and export work without")
    if not command:
        raise LayerState("a container needs a command to run")
    _sweep(pool)
    source = pool.layer(layer_name)
    container = name or f"{source.name.rsplit('/', 1)[-1].replace(':', '-')}-{uuid.uuid4().hex[:8]}"
    mountpoint = container.replace("/", "%2F")
    if len(mountpoint) > _NAME_MAX:
        raise BadName(f"the container name {container!r} is too long for its mount point: {len(mountpoint)} characters, with / as %2F, of {_NAME_MAX}")
    labels = {CONTAINER_LABEL: "1", IMAGE_LABEL: source.name}
    if FILESYSTEM_LABEL in source.labels:
        labels[FILESYSTEM_LABEL] = source.labels[FILESYSTEM_LABEL]
    if remove:
        labels[_REMOVE_LABEL] = _process_identity(os.getpid()) or ""
    layer = source.clone(container, size, labels=labels)
    filesystem, grown = labels.get(FILESYSTEM_LABEL, "ext4"), layer.size > source.size
    try:
        if grown and filesystem == "ext4":
            grow_ext4(layer)
        directory = pool.path / "run" / "containers" / mountpoint
        layer.mount(directory, owner=os.getpid())
        try:
            if grown and filesystem == "xfs":
                grow_xfs(directory)
            return spawn(directory, command, hostname=container, environment={**_ENVIRONMENT, **(environment or {})})
        finally:
            layer.unmount()
    finally:
        if remove:
            layer.delete()


def _process_identity(pid: int) -> str | None:
    """The pid with its start time, which together name a process for good (proc(5), ``/proc/pid/stat``); ``None``: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{pid}:{fields[19]}"


def _sweep(pool: PoolAPI) -> None:
    """Deletes layers whose ``--rm`` was not done because the process that would have done it was killed."""
    for layer in pool.layers(_REMOVE_LABEL):
        with suppress(ThinpoolError):  # somebody else sweeps too, or it is still being taken down
            _sweep_layer(layer)


def _sweep_layer(layer: LayerAPI) -> None:
    owner = layer.labels.get(_REMOVE_LABEL)
    if owner is None:
        return
    pid = owner.partition(":")[0]
    if not pid.isdigit() or _process_identity(int(pid)) != owner:
        with suppress(LayerBusy):
            layer.delete()


def spawn(root: Path, command: Sequence[str], *, hostname: str, environment: Mapping[str, str]) -> int:
    """Runs the command with ``root`` (a mount point) as its root directory, in new mount, PID, UTS and IPC namespaces.

    Standard input, output and error and the terminal are passed on, and signals that would end this process are forwarded; it returns
    when the command has ended and nothing of the container runs any more.
    """
    hostname = hostname.rsplit("/", 1)[-1].replace(":", "-")[:63]
    arguments = [sys.executable, "-I", "-S", str(_INIT), str(os.getpid()), str(root), hostname, *command]
    process = subprocess.Popen(arguments, env=dict(environment), close_fds=True)
    with _Signals(process):
        status = process.wait()
    return 128 - status if status < 0 else status


class _Signals:
    """While a container runs in the foreground: its terminal's signals are for the command, the others are passed on to it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _FROM_TERMINAL:
            self._before[number] = signal.signal(number, signal.SIG_IGN)
        for number in _FORWARDED:
            self._before[number] = signal.signal(number, self._forward)

    def _forward(self, number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
