"""Runs a command in a container: a clone of an image's layer as root directory, in namespaces of its own.

The command, or the OCI runtime that runs it, runs under ``container_init.py``, a process of its own that knows nothing of pools. The mount belongs to
this process as its owner: should it be killed, its container's processes die with it, and whoever holds the pool
takes the mount down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ..api import Container, PoolAPI, Size
from ..errors import BadName, ContainerNotFound, LayerBusy, LayerState, NeedsRoot, ThinpoolError
from ..exports.owners import process_identity
from ..filesystems.blank import FILESYSTEM_LABEL, grow_xfs
from .bundle import bundle, bundle_directory, find_runtime, owner_of, sweep
from .names import layer_stem

_REMOVE_LABEL = "thinpool.remove"  # the pid and start time of the process that will delete the layer when its command ends
_INIT = Path(__file__).with_name("container_init.py")
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_NAME_MAX = 255  # bytes of a file name, as on every file system of Linux
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run says otherwise than the image. ``entrypoint`` "": none; ``user``: like ``name``, ``1000:1000``; ``workdir``: absolute; ``runtime``: an
    OCI runtime's name or path, ``builtin`` for the namespaces made here, "" for the first there is."""

    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    workdir: str | None = None
    entrypoint: str | None = None
    hostname: str | None = None
    runtime: str = ""


def run_container(
    pool: PoolAPI,
    image: str,
    command: Sequence[str] = (),
    *,
    name: str | None = None,
    remove: bool = False,
    size: Size | None = None,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    workdir: str | None = None,
    entrypoint: str | None = None,
    hostname: str | None = None,
    runtime: str = "",
    copies: int = 1,
) -> int:
    """Makes a container from an image (or a layer), and runs the image's command, or this one, in it; the command's exit status.

    128 and the signal's number where a signal ended it, 127 where there is no such command, 126 where it cannot be run. The container is
    named ``name`` (by default after the image) and kept, unless ``remove``. ``size``: a larger one for it, its file system is grown.
    ``runtime``: an OCI runtime's name or path, ``builtin`` for the namespaces made here; by default crun, or runc.
    ``copies``: so many at once, named NAME-1, NAME-2, …, each with its number in ``THINPOOL_COPY`` and its name before each line that it prints;
    the status is then the first that is not 0. Raises NeedsRoot, ImageNotFound, LayerExists, LayerState or ToolFailed.
    """
    _require_root()
    _sweep(pool)
    settings = Settings(command, environment or {}, user, workdir, entrypoint, hostname, runtime)
    stem = name or f"{layer_stem(image)}-{uuid.uuid4().hex[:8]}"
    names = [stem] if copies == 1 else [f"{stem}-{number}" for number in range(1, copies + 1)]
    for one in names:
        _mountpoint(one)
    if copies == 1:
        return _run_new(pool, image, names[0], settings, remove=remove, size=size)
    with ThreadPoolExecutor(copies) as threads:
        runs = [threads.submit(_run_copy, pool, image, one, number, settings, remove, size) for number, one in enumerate(names, 1)]
        statuses = [run.result() for run in runs]
    return next((status for status in statuses if status), 0)


def start_container(pool: PoolAPI, name: str, command: Sequence[str] = (), *, environment: Mapping[str, str] | None = None, runtime: str = "") -> int:
    """Runs a container's command, or this one, in a container that is there; the command's exit status. Raises ContainerNotFound, LayerBusy, …"""
    _require_root()
    return _run_in(pool, pool.containers.get(name), Settings(command, environment or {}, runtime=runtime))


def _require_root() -> None:
    if os.geteuid() != 0:
        raise NeedsRoot("running a container needs root, for its mount and namespaces; create, cp, diff and commit work without")


def _mountpoint(name: str) -> str:
    mountpoint = name.replace("/", "%2F")
    if len(mountpoint) > _NAME_MAX:
        raise BadName(f"the container name {name!r} is too long for its mount point: {len(mountpoint)} characters, with / as %2F, of {_NAME_MAX}")
    return mountpoint


def _run_copy(pool: PoolAPI, image: str, name: str, number: int, settings: Settings, remove: bool, size: Size | None) -> int:
    numbered = replace(settings, environment={**settings.environment, "THINPOOL_COPY": str(number)})
    return _run_new(pool, image, name, numbered, remove=remove, size=size, prefix=f"{name} | ")


def _run_new(pool: PoolAPI, image: str, name: str, settings: Settings, *, remove: bool, size: Size | None, prefix: str = "") -> int:
    labels = {_REMOVE_LABEL: process_identity(os.getpid()) or ""} if remove else {}
    container = pool.containers.create(image, name=name, size=size, labels=labels)
    try:
        return _run_in(pool, container, settings, prefix=prefix)
    finally:
        if remove:
            pool.containers.remove(name)


def _run_in(pool: PoolAPI, container: Container, settings: Settings, *, prefix: str = "") -> int:
    config = pool.containers.configuration(container.name)
    image, own = config["config"], config["command"]
    entrypoint = list(image.get("Entrypoint") or []) if settings.entrypoint is None else [settings.entrypoint] if settings.entrypoint else []
    default = [] if settings.entrypoint is not None else list(image.get("Cmd") or [])
    command = [*entrypoint, *(settings.command or own or default)]
    if not command:
        raise LayerState(f"a container needs a command to run, and {container.image} says none")
    given = dict(pair.partition("=")[::2] for pair in image.get("Env") or [])
    environment = {"PATH": _PATH, **given, **settings.environment}
    layer = pool.layer(container.layer)
    directory = pool.path / "run" / "containers" / _mountpoint(container.name)
    layer.mount(directory, owner=os.getpid())
    try:
        if layer.labels.get(FILESYSTEM_LABEL) == "xfs":
            grow_xfs(directory)
        hostname = (settings.hostname or container.name).rsplit("/", 1)[-1].replace(":", "-")[:63]
        workdir = settings.workdir or image.get("WorkingDir") or "/"
        task = {
            "root": str(directory),
            "command": command,
            "environment": environment,
            "hostname": hostname,
            "user": settings.user if settings.user is not None else image.get("User") or "",
            "workdir": workdir,
            "runtime": None,
        }
        runtime = find_runtime(settings.runtime)
        if runtime is None:
            return _spawn(task, prefix)
        for word in (*command, *environment, *environment.values(), workdir, task["user"]):
            word.encode()  # its configuration is JSON
        place = bundle_directory(pool, directory)
        owner = process_identity(os.getpid()) or ""
        terminal = not prefix and os.isatty(0) and os.isatty(1)
        with bundle(place, runtime, directory, command, owner=owner, hostname=hostname, workdir=workdir, terminal=terminal) as words:
            return _spawn({**task, "runtime": words, "bundle": str(place)}, prefix)
    finally:
        layer.unmount()


def _is_alive(identity: str) -> bool:
    pid = identity.partition(":")[0]
    return pid.isdigit() and process_identity(int(pid)) == identity


def _sweep(pool: PoolAPI) -> None:
    """Removes what killed processes could not: bundles, and containers that were to go with ``--rm``."""
    for place in bundle_directory(pool, "x").parent.glob("*"):
        if (owner := owner_of(place)) and not _is_alive(owner):
            sweep(place)
    for layer in pool.layers(_REMOVE_LABEL):
        with suppress(ThinpoolError):  # somebody else sweeps too, or it is still being taken down
            if not _is_alive(layer.labels.get(_REMOVE_LABEL, "")):
                with suppress(LayerBusy, ContainerNotFound):
                    pool.containers.remove(layer.name)


def _spawn(task: Mapping[str, Any], prefix: str) -> int:
    """Runs a container's command, as ``container_init.py`` is told.

    Standard input, output and error and the terminal are passed on, and signals that would end this process are forwarded; it returns
    when the command has ended and nothing of the container runs any more. ``prefix``: what comes before each line of output, which then
    all goes to standard output, and there is no input.
    """
    reading, telling = os.pipe()
    arguments = [sys.executable, "-I", "-S", str(_INIT), str(os.getpid()), str(reading)]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if prefix else {}
    with open(telling, "w") as told:
        try:
            process = subprocess.Popen(arguments, pass_fds=(reading,), **streams)
        finally:
            os.close(reading)
        with suppress(BrokenPipeError):  # it has failed by then
            json.dump(task, told)
            told.close()
    with process, _Signals(process) if not prefix else nullcontext():
        for line in process.stdout or ():
            sys.stdout.buffer.write(prefix.encode() + line)
            sys.stdout.buffer.flush()
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
