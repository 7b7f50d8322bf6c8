"""The ways by which the workers of the soak test (soak.py) reach its pool: the library, HTTP over TCP, NBD, the command.

All have the same methods, and fail in the same two ways that a worker lives with: ServerError, where the server was killed or replaced and nobody
knows whether it did what was asked for, and OutOfSpace.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import nbdworld

from thinpool import Limits, OutOfSpace, connect
from thinpool.cli import exits
from thinpool.errors import LayerBusy, LayerNotFound, ServerError
from thinpool.server.client import RemotePool
from thinpool.server.tcp import token_of
from thinpool.trash import take_back, throw_away

PIECE = 16 << 10
ESHUTDOWN, ENOSPC = 108, 28  # in NBD's replies


def _die_with_parent() -> None:
    """So that a verb of a killed worker does not come after what the next one does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Library:
    """``thinpool.connect``."""

    lacks: frozenset[str] = frozenset({"take_in"})
    """What a worker cannot do by it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool: RemotePool | None = None

    @property
    def pool(self) -> RemotePool:
        if self._pool is None:
            pool = connect(self.path, server=True)
            assert isinstance(pool, RemotePool)
            self._pool = pool
        return self._pool

    def forget_connections(self) -> None:
        """After a ServerError."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def names(self) -> set[str]:
        return {record.name for record in self.pool.records()}

    def is_sealed(self, name: str) -> bool:
        return self.pool.layer(name).sealed

    def create(self, name: str, size: int) -> None:
        self.pool.create_layer(name, size)

    def snapshot(self, name: str, new: str) -> None:
        self.pool.layer(name).snapshot(new)

    def clone(self, name: str, new: str, size: int) -> None:
        self.pool.layer(name).clone(new, size or None)

    def rename(self, name: str, new: str) -> None:
        self.pool.layer(name).rename(new)

    def seal(self, name: str) -> None:
        self.pool.layer(name).seal()

    def reset(self, name: str, to: str) -> None:
        self.pool.layer(name).reset(to)

    def resize(self, name: str, size: int) -> None:
        self.pool.layer(name).resize(size, allow_shrink=True)

    def delete(self, name: str) -> None:
        self.pool.layer(name).delete()

    def throw_away(self, name: str) -> None:
        throw_away(self.pool, self.pool.layer(name), 1)

    def take_back(self, name: str) -> None:
        take_back(self.pool.layers(), name)

    def limit(self, name: str, bytes_per_second: int, writes_per_second: int) -> None:
        self.pool.layer(name).set_limits(Limits(rbps=bytes_per_second, wbps=bytes_per_second, wiops=writes_per_second))

    def commit(self) -> None:
        self.pool.commit()

    def look(self, name: str, other: str) -> None:
        """What only asks, and whose answers depend on others."""
        layer = self.pool.layer(name)
        covered = sum(extent.length for extent in layer.extents())
        assert covered == layer.size, f"extents of {name} cover {covered} bytes of {layer.size}"
        assert all(extent.length > 0 for extent in self.pool.diff(name, other))
        layer.usage()

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self.pool.layer(name).pread(length, offset)

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.pool.layer(name).pwrite(data, offset)

    def discard(self, name: str, offset: int, length: int) -> None:
        self.pool.layer(name).discard(offset, length)

    def zero(self, name: str, offset: int, length: int) -> None:
        self.pool.layer(name).write_zeroes(offset, length)

    def flush(self, name: str) -> None:
        self.pool.layer(name).flush()


class Http(Library):
    """The HTTP interface over TCP, by a client that knows nothing of thinpool; what changes layers is asked for with ``durable=true``."""

    lacks = frozenset({"take_in", "trash"})

    def __init__(self, path: Path, address: str) -> None:
        super().__init__(path)
        host, _, port = address.rpartition(":")
        self._where = (host, int(port))
        self._connection: http.client.HTTPConnection | None = None

    def forget_connections(self) -> None:
        super().forget_connections()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, method: str, route: str, body: Any = None, **query: Any) -> bytes:
        kind, data = ("application/octet-stream", body) if isinstance(body, bytes) else ("application/json", json.dumps(body))
        headers = {"Content-Type": kind, "Authorization": f"Bearer {token_of(self.path)}"}
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(*self._where, timeout=60)
            self._connection.request(method, f"/v1{route}?{urlencode(query)}", None if body is None else data, headers)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{method} {route}: {error}") from error
        if response.status == 200:
            return answer
        failures: dict[int, type[Exception]] = {404: LayerNotFound, 503: ServerError, 507: OutOfSpace}
        raise failures.get(response.status, LayerBusy if b"LayerBusy" in answer else RuntimeError)(f"{response.status} {answer.decode()}")

    def _id(self, name: str) -> int:
        return int(json.loads(self._send("GET", "/layer", name=name))["id"])

    def _change(self, layer: str, verb: str, /, **body: Any) -> None:
        self._send("POST", f"/layers/{self._id(layer)}/{verb}", body, durable="true")

    def names(self) -> set[str]:
        return {record["name"] for record in json.loads(self._send("GET", "/layers"))}

    def is_sealed(self, name: str) -> bool:
        return bool(json.loads(self._send("GET", "/layer", name=name))["sealed"])

    def create(self, name: str, size: int) -> None:
        self._send("POST", "/layers", {"name": name, "size": size}, durable="true")

    def snapshot(self, name: str, new: str) -> None:
        self._change(name, "snapshot", name=new)

    def clone(self, name: str, new: str, size: int) -> None:
        self._change(name, "clone", name=new, size=size)

    def rename(self, name: str, new: str) -> None:
        self._change(name, "rename", name=new)

    def seal(self, name: str) -> None:
        self._change(name, "seal")

    def reset(self, name: str, to: str) -> None:
        self._change(name, "reset", to=to)

    def resize(self, name: str, size: int) -> None:
        self._change(name, "resize", size=size, allow_shrink=True)

    def delete(self, name: str) -> None:
        self._send("DELETE", f"/layers/{self._id(name)}", durable="true")

    def limit(self, name: str, bytes_per_second: int, writes_per_second: int) -> None:
        self._change(name, "limits", rbps=bytes_per_second, wbps=bytes_per_second, riops=0, wiops=writes_per_second, quota=0)

    def commit(self) -> None:
        pass  # what was done is durable

    def look(self, name: str, other: str) -> None:
        for line in self._send("GET", f"/layers/{self._id(name)}/extents").splitlines():
            assert "error" not in json.loads(line), line
        self._send("GET", "/pool/metrics")

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self._send("GET", f"/layers/{self._id(name)}/data", offset=offset, length=length)

    def write(self, name: str, offset: int, data: bytes) -> None:
        self._send("PUT", f"/layers/{self._id(name)}/data", data, offset=offset)

    def discard(self, name: str, offset: int, length: int) -> None:
        self._send("POST", f"/layers/{self._id(name)}/discard", {"offset": offset, "length": length})

    def zero(self, name: str, offset: int, length: int) -> None:
        self._send("POST", f"/layers/{self._id(name)}/write_zeroes", {"offset": offset, "length": length})

    def flush(self, name: str) -> None:
        self._send("POST", f"/layers/{self._id(name)}/flush")


class Nbd(Library):
    """NBD for all bytes, the library for the rest; a layer that has a client cannot be deleted or changed, so the client leaves before."""

    def __init__(self, path: Path, address: Path) -> None:
        super().__init__(path)
        self._address = str(address)
        self._clients: dict[str, socket.socket] = {}

    def forget_connections(self) -> None:
        super().forget_connections()
        self._leave()

    def _leave(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    @property
    def pool(self) -> RemotePool:
        self._leave()
        return super().pool

    def _client(self, name: str) -> socket.socket:
        if name not in self._clients:
            client = socket.socket(socket.AF_UNIX)
            self._clients[name] = client
            client.settimeout(60)
            client.connect(self._address)
            assert nbdworld.take(client, 18)[:8] in (b"NBDMAGIC", b"")
            client.sendall(struct.pack(">I", 3) + nbdworld.option(nbdworld.EXPORT_NAME, name.encode()))
            struct.unpack(">QH", nbdworld.take(client, 10))
        return self._clients[name]

    def _requests(self, name: str, requests: list[bytes], length: int = 0) -> bytes:
        """Sends them all before it looks at an answer."""
        try:
            client = self._client(name)
            client.sendall(b"".join(requests))
            answers = [nbdworld.simple_reply(client, length) for _ in requests]
        except (OSError, struct.error) as error:
            raise ServerError(f"NBD to {name}: {error}") from error
        for number, _ in answers:
            if number in (ENOSPC, ESHUTDOWN):
                raise (OutOfSpace if number == ENOSPC else ServerError)(f"NBD to {name}: error {number}")
            assert number == 0, f"NBD to {name}: error {number}"
        return answers[0][1]

    def read(self, name: str, offset: int, length: int) -> bytes:
        data = self._requests(name, [nbdworld.request(nbdworld.READ, offset, length)], length)
        if len(data) < length:
            raise ServerError(f"NBD to {name}: the answer was cut off")
        return data

    def write(self, name: str, offset: int, data: bytes) -> None:
        pieces = [(offset + at, data[at : at + PIECE]) for at in range(0, len(data), PIECE)]
        self._requests(name, [nbdworld.request(nbdworld.WRITE, at, len(piece)) + piece for at, piece in pieces])

    def discard(self, name: str, offset: int, length: int) -> None:
        self._requests(name, [nbdworld.request(nbdworld.TRIM, offset, length)])

    def zero(self, name: str, offset: int, length: int) -> None:
        self._requests(name, [nbdworld.request(nbdworld.WRITE_ZEROES, offset, length)])

    def flush(self, name: str) -> None:
        self._requests(name, [nbdworld.request(nbdworld.FLUSH, 0, 0)])


class Cli(Library):
    """A process for each verb. It writes by taking in a file, and reads by exporting to one."""

    lacks = frozenset({"write", "discard", "zero", "flush", "copy"})

    def _run(self, *words: str | int | Path) -> str:
        command = [sys.executable, "-m", "thinpool.cli", "--pool", str(self.path), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, preexec_fn=_die_with_parent)
        if done.returncode == 0:
            return done.stdout
        if done.returncode == exits.NO_SPACE:
            raise OutOfSpace(done.stderr)
        # A verb that met the end of a server says so, and has the code of all that has none of its own.
        if done.returncode == exits.FAILED and "server" in done.stderr:
            raise ServerError(done.stderr)
        if done.returncode == exits.NOT_FOUND:
            raise LayerNotFound(done.stderr)
        raise RuntimeError(f"thinpool {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr}")

    def names(self) -> set[str]:
        return {row["name"] for row in json.loads(self._run("ls", "--json"))}

    def create(self, name: str, size: int) -> None:
        self._run("create", name, size)

    def snapshot(self, name: str, new: str) -> None:
        self._run("snapshot", name, new)

    def clone(self, name: str, new: str, size: int) -> None:
        self._run("clone", name, new, "--size", size)

    def rename(self, name: str, new: str) -> None:
        self._run("rename", name, new)

    def seal(self, name: str) -> None:
        self._run("seal", name)

    def reset(self, name: str, to: str) -> None:
        self._run("reset", name, "--to", to)

    def resize(self, name: str, size: int) -> None:
        self._run("resize", name, size, "--shrink")

    def delete(self, name: str) -> None:
        self._run("rm", name, "--keep", 0)

    def throw_away(self, name: str) -> None:
        self._run("rm", name)

    def take_back(self, name: str) -> None:
        self._run("undelete", name)

    def limit(self, name: str, bytes_per_second: int, writes_per_second: int) -> None:
        self._run("limit", name, "--rbps", bytes_per_second, "--wbps", bytes_per_second, "--wiops", writes_per_second)

    def commit(self) -> None:
        pass  # what a verb did is durable when it returns

    def look(self, name: str, other: str) -> None:
        for words in (["df"], ["ls"], ["ps"], ["map", name], ["diff", name, other], ["undelete"], ["trim"]):
            self._run(*words)

    def take_in(self, name: str, file: Path) -> None:
        """A layer with the content of a file."""
        self._run("import", "--raw", file, "--name", name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            self._run("export", name, Path(directory, "file"))
            with Path(directory, "file").open("rb") as file:
                file.seek(offset)
                return file.read(length)
