"""The NBD server of a pool: listeners, and a thread per connection, which spends its life in csrc/nbd.c."""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadAddress, ThinpoolError
from .handshake import Agreed, Handshake, HangUp
from .tls import pump

if TYPE_CHECKING:
    from ...layer import Layer
    from ...pool import Pool

_LOG = logging.getLogger("thinpool.nbd")
_BACKLOG = 128
_UNIX_PREFIX = "unix:"


class NbdServer:
    """Serves layers under their names. All methods may be called from any thread."""

    def __init__(self, pool: Pool, claim: Callable[[Layer], AbstractContextManager[None]]) -> None:
        """``claim``: entered for as long as a client has the layer; raises LayerBusy."""
        self._pool, self._claim = pool, claim
        self._lock = threading.Lock()
        self._closed = False
        self._listeners: dict[str, socket.socket] = {}
        self._contexts: dict[str, ssl.SSLContext | None] = {}
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()

    def addresses(self) -> list[str]:
        """Where it listens."""
        with self._lock:
            return sorted(self._listeners)

    def listen(self, address: str, context: ssl.SSLContext | None = None) -> str:
        """Listens at ``unix:/path`` (or a path), or at ``host:port`` (port 0: any that is free); the address as it is then.

        With TLS a TCP client must use it; beyond this machine there is no listening without. Raises BadAddress.
        """
        listener, bound = bind(address, has_tls=context is not None)
        self._serve_at(bound, listener, context)
        return bound

    def adopt(self, bound: str, descriptor: int, context: ssl.SSLContext | None) -> None:
        """Goes on listening where another process did."""
        self._serve_at(bound, socket.socket(fileno=os.dup(descriptor)), context)

    def use(self, bound: str, context: ssl.SSLContext | None) -> None:
        """From now on that is how TLS is spoken there."""
        self._contexts[bound] = context

    def descriptor(self, bound: str) -> int:
        """That of the socket that listens there."""
        return self._listeners[bound].fileno()

    def _serve_at(self, bound: str, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        with self._lock:
            if self._closed:
                listener.close()
                raise BadAddress("the pool is closed")
            self._listeners[bound], self._contexts[bound] = listener, context
        self._start(lambda: self._accept(bound, listener))

    def close(self) -> None:
        """Ends all connections, and waits for their last requests."""
        with self._lock:
            self._closed = True
            for one in (*self._listeners.values(), *self._connections):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        for bound, listener in self._listeners.items():
            listener.close()
            if bound.startswith(_UNIX_PREFIX):
                Path(bound.removeprefix(_UNIX_PREFIX)).unlink(missing_ok=True)
        self._listeners.clear()

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="thinpool-nbd", daemon=True)
        with self._lock:
            self._threads.add(thread)
            thread.start()

    def _accept(self, bound: str, listener: socket.socket) -> None:
        while not self._closed:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM) and not self._closed:
                    _LOG.warning("cannot take another connection: %s", error)
                    threading.Event().wait(0.1)
                    continue
                return
            if listener.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            context = self._contexts[bound]
            self._start(lambda connection=connection, context=context: self._serve(connection, context))  # type: ignore[misc]

    def _serve(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        with connection:
            with self._lock:
                if self._closed:
                    return
                self._connections.add(connection)
            secure = None if context is None else lambda plain: context.wrap_socket(plain, server_side=True)
            is_unix = connection.family == socket.AF_UNIX
            claims = ExitStack()

            def claim(layer: Layer) -> None:
                claims.enter_context(self._claim(layer))

            handshake = Handshake(connection, self._pool, claim=claim, secure=secure, tls_required=context is not None and not is_unix)
            try:
                with claims:
                    agreed = handshake.run()
                    handshake.connection.settimeout(None)
                    self._transmit(handshake.connection, agreed)
            except HangUp as reason:
                _LOG.debug("a connection ended in its negotiation: %s", reason)
            except (OSError, ThinpoolError) as error:
                _LOG.info("a connection ended: %s", error)
            finally:
                with self._lock:
                    self._connections.discard(connection)
                with suppress(OSError):
                    handshake.connection.close()

    def _transmit(self, connection: socket.socket, agreed: Agreed) -> None:
        layer = agreed.layer
        options = {
            "read_only": layer.sealed or self._pool.read_only,
            "structured": agreed.structured,
            "contexts": [(number, since.handle if since else None) for number, since in agreed.contexts],
        }
        if not isinstance(connection, ssl.SSLSocket):
            layer.handle.serve_nbd(connection.fileno(), **options)  # type: ignore[arg-type]
            return
        ours, theirs = socket.socketpair()

        def move() -> None:
            with theirs, suppress(OSError):
                pump(connection, theirs)

        pumping = threading.Thread(target=move, name="thinpool-nbd-tls", daemon=True)
        pumping.start()
        with ours:
            layer.handle.serve_nbd(ours.fileno(), **options)  # type: ignore[arg-type]
            ours.shutdown(socket.SHUT_WR)
            pumping.join()


def resolved(address: str, *, has_tls: bool) -> tuple[int, Any, str]:
    """Family, socket address and name of ``unix:/path`` (or a path) or ``host:port``. Raises BadAddress, also without TLS beyond this machine."""
    if "\0" in address:  # the kernel would take a socket's path to end there
        raise BadAddress(f"no address has a zero byte: {address!r}")
    if address.startswith(_UNIX_PREFIX) or "/" in address:
        path = os.path.abspath(address.removeprefix(_UNIX_PREFIX))
        return socket.AF_UNIX, path, f"{_UNIX_PREFIX}{path}"
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise BadAddress(f"an address is host:port (or unix:/path for NBD), not {address!r}")
    try:
        family, _, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise BadAddress(f"cannot listen at {address}: {error.strerror}") from error
    if not has_tls and not _is_loopback(str(where[0])):
        raise BadAddress(f"{address} can be reached from other machines: give certificates or keys for TLS, or listen at 127.0.0.1")
    return family, where, f"{host}:{int(port)}"


def bind(address: str, *, has_tls: bool) -> tuple[socket.socket, str]:
    """A socket that listens there, and its name, with the port that it has. Raises BadAddress."""
    family, where, name = resolved(address, has_tls=has_tls)
    if family == socket.AF_UNIX:
        return _bind_unix(where), name
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise BadAddress(f"cannot listen at {address}: {error.strerror or error}") from error
    return listener, f"{name.rpartition(':')[0]}:{listener.getsockname()[1]}"


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


def _bind_unix(path: str) -> socket.socket:
    """A socket that its owner alone may connect to; one that nobody listens at any more is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_dead(path):
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise BadAddress(f"cannot listen at {path}: {error.strerror or error}") from error
    finally:
        os.umask(mask)
    return listener


def _is_dead(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
