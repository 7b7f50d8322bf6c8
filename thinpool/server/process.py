"""The server's process, started by ``connect``, or by the keeper of one that was killed.

It detaches itself first, so that its starter need not wait for it, and claims the pool before it loads the rest.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from ..errors import ServerError, ThinpoolError
from .logs import LogFile, log_to
from .survival import kept_pool
from .wire import LOG_NAME, LogFormat, encode_error, tell

_log = logging.getLogger("thinpool.server")

# Without the current directory on its path, where anybody may have put a module of some name; with this package on it.
_PROGRAM = """import sys
sys.path.append(sys.argv[1])
from thinpool.server.process import main
main(sys.argv[2], int(sys.argv[3]), bool(int(sys.argv[4])), sys.argv[5], bool(int(sys.argv[6])))
"""


def command(path: Path, ready_fd: int = -1, *, takeover: bool = False, log_format: LogFormat = "text", verify_reads: bool = False) -> list[str]:
    """What starts it; ``ready_fd`` as in :func:`main`, which the process must inherit."""
    home, flags = Path(__file__).parents[2], [str(int(flag)) for flag in (takeover, verify_reads)]
    return [sys.executable, "-P", "-c", _PROGRAM, str(home), os.path.abspath(path), str(ready_fd), flags[0], log_format, flags[1]]


def main(directory: str, ready_fd: int, takeover: bool, log_format: LogFormat, verify_reads: bool) -> None:
    """Serves the pool in ``directory`` and reports to the starter, through ``ready_fd``, how the start went; -1: it is a successor, and nobody waits.

    ``takeover``: in place of the server that runs; ``verify_reads`` as :meth:`Pool.open` has it.
    """
    if os.fork():
        os._exit(0)
    path = Path(directory)
    on_ready = None
    if ready_fd >= 0:
        os.set_inheritable(ready_fd, False)
        on_ready = os.fdopen(ready_fd, "w")
    else:
        log_to(LogFile(path / LOG_NAME), log_format)
    try:
        _serve(path, on_ready, takeover=takeover, log_format=log_format, verify_reads=verify_reads)
    except Exception as error:
        if on_ready is None or on_ready.closed or not isinstance(error, ThinpoolError):
            _log.exception("failed")
        if on_ready is not None and not on_ready.closed:
            tell(on_ready, {"error": encode_error(error)})
        sys.exit(1)
    _log.info("stopped")


def _serve(path: Path, on_ready: IO[str] | None, *, takeover: bool, log_format: LogFormat, verify_reads: bool) -> None:
    if takeover:
        _load()  # before the other leaves
    with kept_pool(path, takeover=takeover, verify_reads=verify_reads) as (pool, keeper):
        if on_ready is not None:
            log_to(LogFile(path / LOG_NAME), log_format)
        os.chdir("/")
        tell_starter = None if on_ready is None else partial(tell, on_ready, {"ready": os.getpid()})
        serve = _load()
        restart = command(pool.path, log_format=log_format, verify_reads=verify_reads)
        serve(pool, keeper, stays=False, restart=restart, on_ready=tell_starter)


def _load() -> Callable[..., None]:
    """The rest of the server, which takes longer to load than to open the pool and go on with its files."""
    try:
        from .daemon import serve
    except ImportError as error:
        raise ServerError(f"the pool's server needs {error.name}: pip install 'thinpool[server]'") from error
    return serve
