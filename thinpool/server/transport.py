"""HTTP over the pool's Unix socket, by the standard library: quick to import, and no dependency for clients.

The socket is named through a descriptor of the pool's directory, as a socket's path may have 107 bytes at most and a
pool's may have more. Connections are kept open and used again; as long as one is open, the server does not stop by itself.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from weakref import WeakSet

from ..errors import PoolClosed, ServerError
from .wire import API, SOCKET_NAME, STATE_HEADER, decode_error

_SUCCESSOR_SECONDS = 30.0  # how long a pool without a server is waited for
_PAUSE_SECONDS = 0.02
STOPPING = 503  # the status of a server that is about to stop and takes no more requests


class ServerStopping(ServerError):
    """The server is about to stop: open the pool again."""


def socket_path(directory_fd: int) -> str:
    """A short path of the pool's socket, good as long as the descriptor is open."""
    return f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}"


class _Connection(http.client.HTTPConnection):
    """One connection to the server of the pool in ``directory``."""

    def __init__(self, directory: Path) -> None:
        super().__init__("localhost")
        self._directory = directory

    def connect(self) -> None:
        directory_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(socket_path(directory_fd))
        except OSError:
            sock.close()
            raise
        finally:
            os.close(directory_fd)
        self.sock = sock

    def is_open(self) -> bool:
        """Whether the other end is open still: it sends nothing unasked."""
        if self.sock is None:  # it said that its answer was the last one
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


_transports: WeakSet[Transport] = WeakSet()


class Transport:
    """Requests to the server of the pool in ``directory``, from any number of threads."""

    def __init__(self, directory: Path) -> None:
        _transports.add(self)
        self._directory = directory
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._uncommitted: dict[str, int] = {}  # the transaction that must be durable for what a server, by its identity, has answered

    def close(self) -> None:
        """Closes the connections; what still runs in other threads ends with its answer."""
        with self._lock:
            self._closed = True
            connections, self._idle = self._idle, []
        for connection in connections:
            connection.close()

    def leave_connections(self) -> None:
        """In a process that was forked: those that there are are the parent's."""
        self._lock = threading.Lock()
        connections, self._idle = self._idle, []
        for connection in connections:
            connection.close()

    def data(self, method: str, route: str, body: bytes | None = None, **query: Any) -> bytes:
        """The answer's bytes to a request whose body is bytes."""
        return self._ask(method, route, body, "application/octet-stream", query)

    def json(self, method: str, route: str, body: Any = None, **query: Any) -> Any:
        """The answer's JSON value to a request with a JSON body (``None``: no body)."""
        encoded = None if body is None else _encoded(body)
        return json.loads(self._ask(method, route, encoded, "application/json", query))

    def commit(self) -> None:
        """Commits. Raises ServerError, now and later, where another server answers than one that had changes which may be lost."""
        with self._lock:
            covered = set(self._uncommitted)
        connection, response = self._send("POST", "/pool/commit", None, "application/json", {})
        self._read(connection, response)
        if covered - {self._note_state(response, changes=False)}:
            raise ServerError(f"the server of the pool {self._directory} was killed: what was not committed may be lost. Connect again, and look")

    def lines(self, method: str, route: str, body: Any = None, **query: Any) -> Iterator[dict[str, Any]]:
        """The answer's JSON lines up to its ``result``; raises its ``error``.

        The request is sent at the first item. An iterator that is dropped before its end closes its connection, by
        which the server knows to end the work.
        """
        encoded = None if body is None else _encoded(body)
        connection, response = self._send(method, route, encoded, "application/json", query)
        self._note_state(response, changes=method != "GET")
        ended = reusable = False
        try:
            while not ended:
                line = self._next_line(response)
                ended = "result" in line or "error" in line
                reusable = ended and _ends_here(response)
                if "error" in line:
                    raise decode_error(line["error"])
                yield line
        finally:
            if reusable:
                self._put_back(connection)
            else:
                response.close()
                connection.close()

    def _next_line(self, response: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            text = response.readline()
            if not text.endswith(b"\n"):
                raise http.client.IncompleteRead(text)
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from None
        line: dict[str, Any] = json.loads(text)
        return line

    def _ask(self, method: str, route: str, body: bytes | None, content_type: str, query: dict[str, Any]) -> bytes:
        connection, response = self._send(method, route, body, content_type, query)
        self._note_state(response, changes=method != "GET")
        return self._read(connection, response)

    def _note_state(self, response: http.client.HTTPResponse, *, changes: bool) -> str:
        """Remembers what is committed of what was answered; the identity of the server."""
        identity, needed, durable = response.headers.get(STATE_HEADER, " 0 0").split(" ")
        with self._lock:
            if changes:
                self._uncommitted[identity] = max(int(needed), self._uncommitted.get(identity, 0))
            if self._uncommitted.get(identity, 0) <= int(durable):
                self._uncommitted.pop(identity, None)
        return str(identity)

    def _read(self, connection: _Connection, response: http.client.HTTPResponse) -> bytes:
        try:
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._gone(error) from None
        self._put_back(connection)
        return answer

    def _send(self, method: str, route: str, body: bytes | None, content_type: str, query: dict[str, Any]) -> tuple[_Connection, http.client.HTTPResponse]:
        url = f"{API}{route}?{urlencode(query)}" if query else API + route
        deadline = time.monotonic() + _SUCCESSOR_SECONDS
        while True:
            connection = self._take()
            is_connected = False
            try:
                if connection.sock is None:
                    connection.connect()
                is_connected = True
                connection.request(method, url, body=body, headers={"Content-Type": content_type})
                response = connection.getresponse()
                if response.status == 200:
                    return connection, response
                answer = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # What only asks may be asked again, of the next server; where there is none there is nothing to connect to.
                if method == "GET" and is_connected and time.monotonic() < deadline:
                    continue
                raise self._gone(error) from None
            if response.status != STOPPING:
                break
            connection.close()
            # It leaves, and has not done it. A successor takes the same socket over; without one it is gone.
            if time.monotonic() > deadline or not os.path.exists(self._directory / SOCKET_NAME):
                raise ServerStopping("the pool's server is stopping: try again")
            time.sleep(_PAUSE_SECONDS)
        self._put_back(connection)
        if response.headers.get("Content-Type") != "application/json" or b'"error"' not in answer:
            raise ServerError(f"the pool's server answered {response.status} to {method} {route}: is it another version?")
        raise decode_error(json.loads(answer)["error"])

    def _take(self) -> _Connection:
        with self._lock:
            if self._closed:
                raise PoolClosed(f"the pool {self._directory} was closed")
            while self._idle:
                connection = self._idle.pop()
                if connection.is_open():
                    return connection
                connection.close()  # its server has ended meanwhile
            return _Connection(self._directory)

    def _put_back(self, connection: _Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _gone(self, error: Exception) -> ServerError:
        return ServerError(f"the server of the pool {self._directory} cannot be reached or went away ({error}): connect again")


def _leave_connections() -> None:
    for transport in list(_transports):
        transport.leave_connections()


os.register_at_fork(after_in_child=_leave_connections)


def _encoded(body: Any) -> bytes:
    """Raises UnicodeEncodeError for a path that is not UTF-8, which JSON cannot tell the server."""
    return json.dumps(body, ensure_ascii=False).encode()


def _ends_here(response: http.client.HTTPResponse) -> bool:
    """Whether its connection can be used again. A server that was killed after the last line has done what that says."""
    try:
        return not response.read()
    except (OSError, http.client.HTTPException):
        return False
