"""The server's process, started by ``connect``.

It detaches itself first, so that its starter need not wait for it, and locks the pool before it loads the rest.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import IO

from ..errors import ServerError, ThinpoolError
from ..pool import Pool
from .wire import LOG_NAME, encode_error, tell

_log = logging.getLogger("thinpool.server")
_LOG_BYTES = 1 << 20  # a longer log is begun anew


def main(directory: str, ready_fd: int) -> None:
    """Serves the pool in ``directory`` and reports to the starter, through ``ready_fd``, how the start went."""
    if os.fork():
        os._exit(0)
    path = Path(directory)
    os.set_inheritable(ready_fd, False)
    on_ready = os.fdopen(ready_fd, "w")
    try:
        with Pool.open(path) as pool:
            _log_to(path / LOG_NAME)
            os.chdir("/")
            _serve(pool, on_ready)
    except Exception as error:
        if on_ready.closed or not isinstance(error, ThinpoolError):
            _log.exception("failed")
        if not on_ready.closed:
            tell(on_ready, {"error": encode_error(error)})
        sys.exit(1)
    _log.info("stopped")


def _serve(pool: Pool, on_ready: IO[str]) -> None:
    try:
        from .daemon import serve
    except ImportError as error:
        raise ServerError(f"the pool's server needs {error.name}: pip install 'thinpool[server]'") from error
    serve(pool, stays=False, on_ready=on_ready)


def _log_to(path: Path) -> None:
    """Sends all output to the pool's log."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if os.fstat(fd).st_size > _LOG_BYTES:
        os.ftruncate(fd, 0)
    os.dup2(fd, sys.stdout.fileno())
    os.dup2(fd, sys.stderr.fileno())
    os.close(fd)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(process)d] %(message)s")
