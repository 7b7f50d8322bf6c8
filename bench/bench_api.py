"""The HTTP interface: clones over one keep-alive connection on the Unix socket, not pipelined, against the library's on the same disk."""

from __future__ import annotations

import socket
import statistics
from pathlib import Path

from conftest import Row
from harness import clock

import thinpool
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect
from thinpool.server.wire import API, SOCKET_NAME

_ROUNDS, _CLONES = 7, 200


class Connection:
    """One connection, and as little as possible around it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._answers = self._socket.makefile("rb")

    def post(self, route: str, body: str) -> None:
        """One request; the answer must be a good one."""
        self._socket.sendall(
            f"POST {API}{route} HTTP/1.1\r\nHost: pool\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        status, length = self._answers.readline(), 0
        while (line := self._answers.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line[15:])
        answer = self._answers.read(length)
        assert b" 200 " in status, answer

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


def test_clones_a_second(place: Path, row: Row) -> None:
    with thinpool.Pool.create(place / "served") as pool:
        pool.create_layer("base", "10G").seal()
    with thinpool.Pool.create(place / "local") as local, connect(place / "served", server=True) as served:
        assert isinstance(served, RemotePool)
        base = local.create_layer("base", "10G")
        base.seal()
        connection = Connection(place / "served" / SOCKET_NAME)
        route = f"/layers/{served.layer('base').id}/clone"

        def over_http(name: str, query: str) -> float:
            return _CLONES / clock(lambda: [connection.post(route + query, f'{{"name": "{name}-{number}"}}') for number in range(_CLONES)])

        def in_library(name: str) -> float:
            return _CLONES / clock(lambda: [(base.clone(f"{name}-{number}"), local.commit()) for number in range(_CLONES)])

        def with_one_commit(name: str) -> float:
            return _CLONES / clock(lambda: [over_http(name, ""), connection.post("/pool/commit", "")])

        rounds = [(over_http(f"a{n}", "?durable=true"), in_library(f"b{n}"), with_one_commit(f"c{n}")) for n in range(_ROUNDS)]
        connection.close()
    durable, library, together = zip(*rounds, strict=True)
    note = "one at a time, each answered once it is durable"
    row("HTTP: durable clones", statistics.median(durable), 500, "a second", note=note)
    row(
        "HTTP: durable clones, of the library's",
        statistics.median(a / b for a, b in zip(durable, library, strict=True)),
        0.5,
        "of clone and commit in this process",
    )
    row("HTTP: clones, then one commit", statistics.median(together), 500, "a second", note=f"{_CLONES} clones a commit")
