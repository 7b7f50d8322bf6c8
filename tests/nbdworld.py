"""What the tests of NBD share: a served pool with a layer to use and others that must not change, and a client by hand."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import thinpool

MIB = 1 << 20
SIZE = 32 * MIB
EXPORT_NAME, LIST, STARTTLS, INFO, GO, STRUCTURED, SET_CONTEXTS = 1, 3, 5, 6, 7, 8, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
SIMPLE_MAGIC, STRUCTURED_MAGIC = 0x67446698, 0x668E33EF
OFFSET_DATA, STATUS, ERROR_CHUNK = 1, 5, 32769


def run(*command: str | Path, check: bool = True) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace", check=False, timeout=60)
    assert done.returncode == 0 or not check, f"{command}: {done.stdout} {done.stderr}"
    return done.stdout + done.stderr


def digest(layer: thinpool.Layer) -> str:
    return hashlib.sha256(layer.pread(layer.size, 0)).hexdigest()


class World:
    """A pool with a layer to use, and others whose content must not change."""

    def __init__(self, pool: thinpool.Pool, directory: Path, *, siblings: bool) -> None:
        self.pool, self.socket = pool, directory / "nbd.sock"
        layer = pool.create_layer("base", SIZE)
        rng = random.Random(1)
        for _ in range(40):
            layer.pwrite(rng.randbytes(50_000), rng.randrange(SIZE - 50_000))
        self.others: list[thinpool.Layer] = []
        if siblings:
            self.others = [layer, layer.snapshot("snapshot"), layer.clone("sibling")]
            layer = pool.layer("snapshot").clone("disk")
        else:
            layer.rename("disk")
        self.layer = layer
        self.digests = [digest(other) for other in self.others]
        pool.serve_nbd(f"unix:{self.socket}")

    def uri(self, name: str = "disk") -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(str(self.socket))
        return client

    def verify(self) -> None:
        assert [digest(other) for other in self.others] == self.digests


# --- a client by hand ---


def take(client: socket.socket, length: int) -> bytes:
    """So many bytes, unless the server ends the connection before."""
    data = bytearray()
    while len(data) < length and (piece := client.recv(length - len(data))):
        data += piece
    return bytes(data)


def option(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", kind, len(data)) + data


def request(kind: int, offset: int, length: int, flags: int = 0, magic: int = 0x25609513, cookie: int = 42) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length)


def negotiated(world: World, name: bytes = b"disk") -> socket.socket:
    """A connection in its transmission phase, with simple replies."""
    client = world.connect()
    assert take(client, 18)[:8] == b"NBDMAGIC"
    client.sendall(struct.pack(">I", 3) + option(EXPORT_NAME, name))
    size, _ = struct.unpack(">QH", take(client, 10))
    assert size == SIZE
    return client


def structured(world: World, contexts: Sequence[bytes] = (), name: bytes = b"disk") -> socket.socket:
    """The same with structured replies and metadata contexts, whose ids are 1, 2, ..."""
    client = world.connect()
    assert take(client, 18)[:8] == b"NBDMAGIC"
    text = struct.pack(">I", len(name)) + name
    queries = b"".join(struct.pack(">I", len(context)) + context for context in contexts)
    wanted = option(SET_CONTEXTS, text + struct.pack(">I", len(contexts)) + queries)
    client.sendall(struct.pack(">I", 3) + option(STRUCTURED) + (wanted if contexts else b"") + option(GO, text + bytes(2)))
    kind = answer = 0
    while (kind, answer) != (GO, 1):
        _, kind, answer, length = struct.unpack(">QIII", take(client, 20))
        assert answer < 1 << 31
        take(client, length)
    return client


def simple_reply(client: socket.socket, length: int = 0) -> tuple[int, bytes]:
    """Error and data of a simple reply to the request with cookie 42."""
    magic, error, cookie = struct.unpack(">IIQ", take(client, 16))
    assert (magic, cookie) == (SIMPLE_MAGIC, 42)
    return error, b"" if error else take(client, length)


@dataclass
class Chunk:
    """One of a structured reply."""

    kind: int
    data: bytes


def structured_reply(client: socket.socket) -> list[Chunk]:
    """All chunks of one reply."""
    chunks, flags = [], 0
    while not flags & 1:
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", take(client, 20))
        assert (magic, cookie) == (STRUCTURED_MAGIC, 42)
        chunks.append(Chunk(kind, take(client, length)))
    return chunks
