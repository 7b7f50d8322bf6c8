"""The server's life: a process in a session of its own (``process``), started by ``connect``.

::

    start -> lock the pool -> bind the socket -> serve -> gate closed -> socket gone -> uses taken down, pool closed -> end

A server that is killed, or that leaves for a successor, leaves all of it in place (``survival``). The pool's lock decides who may start; only
its holder touches the socket's name, so a socket left by a killed server and its keeper is simply replaced. The starter waits on a pipe: it gets
one JSON line, ``{"ready": pid}`` once the socket accepts, or ``{"error": …}``. The server ends by itself when no connection, no request, no attachment
and no NBD or TCP address has been there for IDLE_SECONDS, when its socket's name is gone (nobody can reach it), or on SIGTERM or SIGINT; on SIGUSR1 it leaves
for a successor. Before it ends by itself it closes the gate, and looks at the attachments only then: a request is either answered or turned
away, never lost.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ..errors import BadAddress
from ..exports.keeping.link import KeeperLink
from ..exports.nbd.server import resolved
from ..exports.nbd.tls import tls_context
from ..pool import Pool
from .app import create_app
from .state import Gate
from .survival import identity_of, leave
from .tcp import Listener, TcpListeners, address_of, listener_at, token_of
from .transport import socket_path
from .wire import SOCKET_NAME

IDLE_SECONDS = 2.0
_GRACE_SECONDS = 10  # what a request may still take after SIGTERM
_CHECK_TICKS = 5  # uvicorn ticks ten times a second
_FOREVER_SECONDS = 1 << 31

_log = logging.getLogger("thinpool.server")


class _Server(uvicorn.Server):
    """uvicorn on the pool's socket, with this server's reasons to end."""

    def __init__(
        self, pool: Pool, keeper: KeeperLink, *, stays: bool, restart: Sequence[str] | None, listener: socket.socket | None, tcp: Sequence[Listener]
    ) -> None:
        self._gate = Gate()
        self.identity = identity_of(keeper)
        self._tcp, self._tcp_at_first = TcpListeners(pool.path, self, keeper), tcp
        # Connections are never closed for being quiet: an open one is how a client says that it is there.
        super().__init__(
            uvicorn.Config(
                create_app(pool, self._gate, self._tcp, self.identity),
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=_FOREVER_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._pool, self._keeper = pool, keeper
        self._stays, self._restart = stays, restart
        self.leaves = False  # for a successor
        self._socket_path = pool.path / SOCKET_NAME
        self._is_ours = listener is None
        if listener is not None:
            self._socket = listener
        elif kept := keeper.kept("http"):
            self._socket = socket.socket(fileno=os.dup(kept[0]))
        else:
            self._socket = _bind(pool.path)
            keeper.keep("http", [self._socket.fileno()])
        found = self._socket_path.stat()
        self._socket_id = (found.st_dev, found.st_ino)
        self._on_ready: Callable[[], None] | None = None

    def run_until_done(self, on_ready: Callable[[], None] | None) -> None:
        """Serves; calls ``on_ready`` when the socket accepts."""
        self._on_ready = on_ready
        # uvicorn raises the signal that ended it once more, for the handler from before; by then we want to clean up.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: self._leave())
        self.run(sockets=[self._socket])

    def _leave(self) -> None:
        self.leaves = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in self._tcp_at_first:
            await self._tcp.serve(listener)
        await self._tcp.go_on()
        _log.info("serving %s", self._pool.path, extra={"event": "serving", "fields": {"pool": str(self._pool.path)}})
        if self._on_ready is not None:
            self._on_ready()
        self._keeper.survive(self._restart, self._leave)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (counter % _CHECK_TICKS == 0 and self._is_done())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gate.close()
        if not self.leaves:
            self._gate.stopping.set()
            if self._is_ours and self._reachable():
                self._socket_path.unlink()
        await super().shutdown(sockets)

    def _is_done(self) -> bool:
        if not self._reachable():
            _log.warning("the socket of %s is gone: nobody can reach this server", self._pool.path)
            return True
        if self._stays or self._tcp.addresses() or self.server_state.connections or self._gate.idle_seconds() < IDLE_SECONDS:
            return False
        self._gate.closed = True
        try:
            self._gate.closed = not self._pool.attachments() and not self._pool.nbd_addresses()
        except Exception:
            _log.exception("the attachments cannot be read")
        return self._gate.closed

    def _reachable(self) -> bool:
        try:
            found = self._socket_path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._socket_id


def _bind(directory: Path) -> socket.socket:
    """A socket bound to the pool's name for it, mode 0600. The caller holds the pool's lock."""
    path = directory / SOCKET_NAME
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    mask = os.umask(0o177)
    try:
        sock.bind(socket_path(directory_fd))
    finally:
        os.umask(mask)
        os.close(directory_fd)
    return sock


@dataclass(frozen=True)
class Addresses:
    """Where a server is reached besides its socket."""

    nbd: Sequence[str]
    http: Sequence[str]
    certificates: Path | None
    keys: Path | None
    verify_peer: bool

    def check(self) -> None:
        """Raises BadAddress for what can be no address, or not with these files."""
        tls_context(self.certificates, self.keys, verify_peer=self.verify_peer)
        for address in self.nbd:
            resolved(address, has_tls=self.certificates is not None or self.keys is not None)
        for address in self.http:
            address_of(address, self.certificates, verify_peer=self.verify_peer)

    def listen(self, pool: Pool, keeper: KeeperLink, tell: Callable[[str], None]) -> list[Listener]:
        """Serves NBD, and gives where HTTP is to be served, with the sockets that the server before had there. ``tell``: called with each address.

        Raises BadAddress, unless something is attached: where one cannot listen that costs nobody a file system, and is logged.
        """
        found: list[Listener] = []

        def serve_nbd(address: str) -> str:
            return pool.serve_nbd(address, certificates=self.certificates, keys=self.keys, verify_peer=self.verify_peer)

        def serve_http(address: str) -> str:
            token_of(pool.path)
            found.append(listener_at(address, self.certificates, verify_peer=self.verify_peer, keeper=keeper))
            return found[-1].address

        for name, serve_at, addresses in (("NBD", serve_nbd, self.nbd), ("HTTP", serve_http, self.http)):
            for address in addresses:
                try:
                    tell(serve_at(address))
                except (BadAddress, OSError) as error:
                    if not pool.attachments():
                        raise
                    _log.error("%s is not served at %s as told: %s", name, address, error)  # it may be as it was told before
        return found


def serve(
    pool: Pool,
    keeper: KeeperLink,
    *,
    stays: bool,
    restart: Sequence[str] | None = None,
    listener: socket.socket | None = None,
    tcp: Sequence[Listener] = (),
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serves an open pool until nobody needs it; ``stays``: until a signal. The caller closes the pool afterwards.

    ``restart``: what the keeper starts when this process was killed; ``None``: somebody else will. ``listener``: the socket ``server.sock``, where somebody
    else has made it; ``tcp``: where it is served over TCP too. Does not return where it leaves for a successor.
    """
    server = _Server(pool, keeper, stays=stays, restart=restart, listener=listener, tcp=tcp)
    server.run_until_done(on_ready)
    if server.leaves:
        _log.info("leaving it to the next server", extra={"event": "leaving"})
        leave(pool, keeper, server.identity)
    _log.info("stopping", extra={"event": "stopping"})
