"""The FUSE server against requests that no kernel would send: it answers or ignores them, and goes on serving.

The connection is a socket pair in place of /dev/fuse, so this needs neither root nor FUSE.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest

import thinpool
from thinpool.exports.fuse import FuseServer

HEADER = struct.Struct("<IIQQIIII")  # struct fuse_in_header
REPLY = struct.Struct("<IiQ")  # struct fuse_out_header
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, INIT, READDIR, BATCH_FORGET, FALLOCATE, LSEEK = 1, 2, 3, 4, 14, 15, 16, 26, 28, 42, 43, 46
ROOT = 1
MIB = 1 << 20


class Kernel:
    """The other end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._unique = 0

    def send(self, opcode: int, inode: int, body: bytes = b"", length: int | None = None) -> int:
        self._unique += 2
        total = HEADER.size + len(body) if length is None else length
        self.connection.send(HEADER.pack(total, opcode, self._unique, inode, 0, 0, 0, 0) + body)
        return self._unique

    def answer(self, unique: int) -> tuple[int, bytes]:
        """(errno, body) of the answer to one request; others' are skipped."""
        while True:
            reply = self.connection.recv(2 * MIB)
            assert len(reply) >= REPLY.size
            length, error, its_unique = REPLY.unpack_from(reply)
            assert length == len(reply)
            if its_unique == unique:
                return -error, reply[REPLY.size :]

    def ask(self, opcode: int, inode: int, body: bytes = b"") -> tuple[int, bytes]:
        return self.answer(self.send(opcode, inode, body))


@pytest.fixture
def kernel(pool: thinpool.Pool) -> Iterator[Kernel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
    server = FuseServer(pool, [theirs.fileno()] * 8)
    yield Kernel(ours)
    ours.close()
    server.stop()
    theirs.close()


def test_init_agrees_on_what_both_know(kernel: Kernel) -> None:
    error, body = kernel.ask(INIT, 0, struct.pack("<4I", 7, 31, 65536, 0xFFFFFFFF))
    major, _, _, _, background, _, max_write = struct.unpack_from("<4I2HI", body)
    assert (error, major) == (0, 7)
    assert background >= 64
    assert max_write >= 128 << 10


def test_init_of_a_newer_major_version_is_answered_with_ours(kernel: Kernel) -> None:
    error, body = kernel.ask(INIT, 0, struct.pack("<4I", 8, 0, 0, 0))
    assert (error, body[:4]) == (0, struct.pack("<I", 7))


def test_init_of_an_old_kernel_is_refused(kernel: Kernel) -> None:
    assert kernel.ask(INIT, 0, struct.pack("<4I", 7, 12, 0, 0))[0] == errno.EPROTO


def test_an_unknown_operation_is_not_implemented(kernel: Kernel) -> None:
    for opcode in (0, 7, 63, 4096, 2**32 - 1):
        assert kernel.ask(opcode, ROOT)[0] == errno.ENOSYS


def test_a_body_too_short_is_refused(kernel: Kernel, pool: thinpool.Pool) -> None:
    inode = pool.create_layer("a", MIB).id + 1
    for opcode in (SETATTR, OPEN, READ, WRITE, READDIR, FALLOCATE, LSEEK):
        assert kernel.ask(opcode, inode, b"\0" * 7)[0] == errno.EINVAL
    assert kernel.ask(LOOKUP, ROOT, b"not terminated")[0] == errno.EINVAL


def test_a_write_whose_length_lies_is_refused(kernel: Kernel, pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", MIB)
    for size in (0, 3, 5, 2**32 - 1):
        body = struct.pack("<QQIIQII", 0, 0, size, 0, 0, 0, 0) + b"data"
        assert kernel.ask(WRITE, layer.id + 1, body)[0] == errno.EINVAL
    assert layer.pread(4, 0) == bytes(4)


def test_offsets_beyond_all_bounds_are_refused(kernel: Kernel, pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", MIB)
    inode, far = layer.id + 1, 2**64 - 2
    assert kernel.ask(READ, inode, struct.pack("<QQIIQII", 0, far, 4096, 0, 0, 0, 0)) == (0, b"")
    assert kernel.ask(WRITE, inode, struct.pack("<QQIIQII", 0, far, 4, 0, 0, 0, 0) + b"data")[0] == errno.EFBIG
    punch = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    assert kernel.ask(FALLOCATE, inode, struct.pack("<QQQII", 0, far, 2**64 - 1, punch, 0))[0] == 0
    assert kernel.ask(LSEEK, inode, struct.pack("<QQII", 0, far, os.SEEK_DATA, 0))[0] == errno.ENXIO


def test_an_inode_that_never_was_is_stale(kernel: Kernel) -> None:
    assert kernel.ask(GETATTR, 4711)[0] == errno.ESTALE
    assert kernel.ask(GETATTR, 2**64 - 1)[0] == errno.ESTALE
    assert kernel.ask(GETATTR, 0)[0] == errno.EINVAL


def test_a_layer_answers_under_its_inode_without_having_been_looked_up(kernel: Kernel, pool: thinpool.Pool) -> None:
    """So a new server process can go on where another ended; and a FORGET too many does no harm."""
    layer = pool.create_layer("a", MIB)
    layer.pwrite(b"content", 0)
    read = struct.pack("<QQIIQII", 0, 0, 7, 0, 0, 0, 0)
    for _ in range(3):
        assert kernel.ask(READ, layer.id + 1, read) == (0, b"content")
        kernel.send(FORGET, layer.id + 1, struct.pack("<Q", 2**63))
        kernel.send(BATCH_FORGET, 0, struct.pack("<IIQQ", 2**32 - 1, 0, layer.id + 1, 1))


def test_random_requests_do_no_harm(kernel: Kernel, pool: thinpool.Pool) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    inodes = [pool.create_layer(f"l{i}", MIB).id + 1 for i in range(3)]
    sealed = pool.create_layer("sealed", MIB)
    sealed.pwrite(b"kept", 0)
    sealed.seal()
    for _ in range(3000):
        body = rng.randbytes(rng.choice((0, 1, 8, 16, 24, 40, 48, 88, 104, 4096)))
        if rng.random() < 0.5:  # mostly zeros: small numbers get further than random ones
            body = bytes(byte if rng.random() < 0.1 else 0 for byte in body)
        length = rng.choice((None, None, None, None, 0, 39, 2**32 - 1))
        kernel.send(rng.randrange(53), rng.choice((0, ROOT, *inodes, sealed.id + 1, 999, 2**64 - 1)), body, length)
        if rng.random() < 0.1:
            assert kernel.ask(GETATTR, ROOT)[0] == 0
    assert kernel.ask(GETATTR, ROOT)[0] == 0
    assert sealed.pread(4, 0) == b"kept"
