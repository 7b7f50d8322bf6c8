"""How a program gets a pool that others may be using too: through its server, or by opening it here.

No race is left to luck. The pool's lock says who has it open. Who finds it taken waits a moment: for the holder to end,
or for its server's socket. Who starts a server holds a lock on the pool's directory meanwhile, so that of several
starters one starts it and the others find it running.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PoolBusy, PoolNotFound, ServerError
from .wire import LOG_NAME, SOCKET_NAME, LogFormat, decode_error

if TYPE_CHECKING:  # loaded when there is a server, or none: a command should not wait for both
    from ..pool import Pool
    from .client import RemotePool

BUSY_SECONDS = 10.0  # how long one process may hold the pool before we give up on it


def connect(path: str | Path, *, server: bool = False, log_format: LogFormat = "text") -> Pool | RemotePool:
    """The pool in ``path``: through its server when one runs, else opened in this process; read-only where its file system is.

    ``server`` starts one in the background first, so that attachments outlive this process; ``log_format``: how that one logs. Raises PoolNotFound; PoolBusy
    when another process that is no server keeps the pool to itself.
    """
    path = Path(path)
    holder, patience_ends = 0, time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return _connect_once(path, server=server, log_format=log_format)
        except PoolBusy as busy:
            now = time.monotonic()
            if busy.pid != holder:
                holder, patience_ends = busy.pid, now + BUSY_SECONDS
            elif now > patience_ends:
                raise
        # At random, so that many who wait do not ask in step.
        time.sleep(random.uniform(0.01, 0.05))


def _connect_once(path: Path, *, server: bool, log_format: LogFormat) -> Pool | RemotePool:
    remote = _find_server(path)
    if remote is not None:
        return remote
    if not server:
        return _opened(path)
    with _start_lock(path):
        remote = _find_server(path)
        if remote is None:
            _start(path, log_format)
            remote = _find_server(path)
    if remote is None:
        raise PoolBusy(f"the server of {path} stopped as it started: try again")
    return remote


def _opened(path: Path) -> Pool:
    from ..pool import Pool

    try:
        return Pool.open(path)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return Pool.open(path, read_only=True)


def _find_server(path: Path) -> RemotePool | None:
    """The pool through its server, or None when none answers or it is about to stop."""
    if not os.path.exists(path / SOCKET_NAME):
        return None
    from .client import RemotePool

    try:
        return RemotePool(path)
    except ServerError:
        return None


@contextmanager
def _start_lock(path: Path) -> Iterator[None]:
    """Held by the one who starts the server; the kernel drops it when its holder dies."""
    try:
        directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise PoolNotFound(f"{path} is not a pool: there is no such directory") from None
        raise
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory_fd)


def take_over(path: Path, log_format: LogFormat = "text", *, verify_reads: bool = False) -> RemotePool:
    """Starts a server in place of the one that runs, or where none runs, and gives the pool through it. What is attached and mounted stays so.

    ``verify_reads``: chunks that have a checksum are compared with it when they are read, as long as that server and those that follow a killed one run.
    Raises what the new server failed with; the old one is then as it was, or its keeper starts another.
    """
    with _start_lock(path):
        _start(path, log_format, takeover=True, verify_reads=verify_reads)
        remote = _find_server(path)
    if remote is None:
        raise ServerError(f"the server of {path} stopped as it started: see {path / LOG_NAME}")
    return remote


def _start(path: Path, log_format: LogFormat, *, takeover: bool = False, verify_reads: bool = False) -> None:
    """Starts the server and waits until its socket accepts. Raises what it failed with."""
    import subprocess

    from .process import command

    ready_fd, child_fd = os.pipe()
    with os.fdopen(ready_fd) as ready:
        words = command(path, child_fd, takeover=takeover, log_format=log_format, verify_reads=verify_reads)
        try:
            # Its standard error is ours until it has the pool and with it a log.
            starting = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[child_fd], start_new_session=True)
        finally:
            os.close(child_fd)
        starting.wait()  # short: it goes on in a child of its own
        news = ready.read()
    if not news:
        raise ServerError(f"the pool's server did not start: see {path / LOG_NAME}")
    if "error" in (answer := json.loads(news)):
        raise decode_error(answer["error"])
