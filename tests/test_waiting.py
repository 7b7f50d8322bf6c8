"""A policy by which writers of devices wait for room: they get it once there is some, hold up nobody, and end with the pool."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commandline import Command, wait_until
from conftest import needs_root
from nbdworld import EXPORT_NAME, NO_HOLE, READ, WRITE, WRITE_ZEROES, option, request, simple_reply, take

import thinpool
from thinpool.api import PoolAPI
from thinpool.server.connect import connect, take_over

MIB = 1 << 20


@pytest.fixture
def full(pool_path: Path) -> Iterator[thinpool.Pool]:
    """A pool whose layer ``b`` takes all of its 8 MiB; its layer ``a`` is empty."""
    with thinpool.Pool.create(pool_path, capacity="8M") as pool:
        pool.create_layer("a", "64M")
        pool.create_layer("b", "8M").pwrite(b"b" * 8 * MIB, 0)
        pool.set_policy(thinpool.Policy(wait=3600))
        yield pool


def waiting(pool: PoolAPI) -> int:
    return pool.metrics().waiting_writers


def failed(pool: PoolAPI) -> int:
    """How many writes have so far."""
    return pool.metrics().operations["write"].errors


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def write_directly(device: str) -> int:
    """A MiB, past the page cache."""
    with mmap.mmap(-1, MIB) as memory:
        memory.write(b"a" * MIB)
        descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
        try:
            return os.pwrite(descriptor, memory, 0)
        finally:
            os.close(descriptor)


def raise_capacity(pool: thinpool.Pool) -> None:
    pool.set_capacity("64M")


def remove_a_layer(pool: thinpool.Pool) -> None:
    pool.layer("b").delete()


def change_the_policy(pool: thinpool.Pool) -> None:
    pool.set_policy(thinpool.Policy(extend_at=90, wait=3600))


@needs_root()
@pytest.mark.parametrize("make_room", [raise_capacity, remove_a_layer, change_the_policy])
def test_many_that_wait_in_the_file_tree_hold_up_nobody(full: thinpool.Pool, make_room: Callable[[thinpool.Pool], None]) -> None:
    files = full.uses.files()  # type: ignore[attr-defined]  # not in the protocol
    one, two = os.open(files / "a", os.O_RDWR), os.open(files / "b", os.O_RDWR)
    before, written = failed(full), list[int]()
    writers = [in_background(lambda at=at: written.append(os.pwrite(one, b"a" * 65536, at << 16))) for at in range(40)]
    wait_until(lambda: waiting(full) == 40)
    assert os.pwrite(two, b"c" * 4096, MIB) == 4096
    assert os.pread(two, 4096, MIB) == b"c" * 4096
    with pytest.raises(thinpool.OutOfSpace):
        full.layer("a").pwrite(b"d", 0)  # the library does not wait
    assert written == []
    os.close(two)
    make_room(full)
    for writer in writers:
        writer.join()
    os.close(one)
    assert written == [65536] * 40
    assert (waiting(full), failed(full)) == (0, before + 1), "only the library's"
    assert full.layer("a").pread(40 << 16, 0) == b"a" * (40 << 16)


@needs_root()
def test_what_is_behind_a_block_device_waits(full: thinpool.Pool) -> None:
    device, written = full.layer("a").attach().device, list[int]()
    writer = in_background(lambda: written.append(write_directly(device)))
    wait_until(lambda: waiting(full) > 0)
    assert written == []
    full.layer("b").delete()
    writer.join()
    assert written == [MIB] and full.layer("a").pread(MIB, 0) == b"a" * MIB
    full.layer("a").detach()


def connected(address: Path, name: bytes) -> socket.socket:
    """A client of NBD in its transmission phase."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(address))
    take(client, 18)
    client.sendall(struct.pack(">I", 3) + option(EXPORT_NAME, name))
    take(client, 10)
    return client


@pytest.mark.parametrize(("kind", "flags", "data"), [(WRITE, 0, b"a" * 65536), (WRITE, 0, b"a" * MIB), (WRITE_ZEROES, NO_HOLE, b"")])
def test_a_client_of_nbd_waits_and_holds_up_no_other(full: thinpool.Pool, tmp_path: Path, kind: int, flags: int, data: bytes) -> None:
    full.serve_nbd(f"unix:{tmp_path}/nbd")
    clients = [connected(tmp_path / "nbd", name) for name in (b"a", b"b")]
    clients[0].sendall(request(kind, 0, len(data) or MIB, flags) + data)
    wait_until(lambda: waiting(full) > 0)
    clients[1].sendall(request(READ, 0, 10))
    assert simple_reply(clients[1], 10) == (0, b"b" * 10)
    full.set_capacity("64M")
    assert simple_reply(clients[0]) == (0, b"")
    assert full.layer("a").pread(10, 0) == (data[:10] or bytes(10))
    for client in clients:
        client.close()


@needs_root()
def test_it_ends(full: thinpool.Pool) -> None:
    full.set_policy(thinpool.Policy(wait=1))
    descriptor, before = os.open(full.uses.files() / "a", os.O_RDWR), failed(full)  # type: ignore[attr-defined]  # not in the protocol
    with pytest.raises(OSError, match="No space left"):
        os.pwrite(descriptor, b"a", 0)
    assert failed(full) == before + 1
    os.close(descriptor)


@needs_root()
def test_it_is_kept_and_ends_with_the_pool(full: thinpool.Pool, pool_path: Path) -> None:
    full.close()
    with thinpool.Pool.open(pool_path) as pool:
        files = pool.uses.files()  # type: ignore[attr-defined]  # not in the protocol

        def write() -> None:
            with suppress(OSError), open(files / "a", "r+b", buffering=0) as file:
                file.write(b"a")

        writers = [in_background(write) for _ in range(3)]
        wait_until(lambda: waiting(pool) == 3)
        closer = in_background(pool.close)
        for thread in (*writers, closer):
            thread.join()


@needs_root()
def test_it_goes_on_under_another_server(pool_path: Path) -> None:
    """The kernel asks that one again."""
    thinpool.Pool.create(pool_path, capacity="8M").close()
    with connect(pool_path, server=True) as pool:
        pool.create_layer("b", "8M").pwrite(b"b" * 8 * MIB, 0)
        pool.set_policy(thinpool.Policy(wait=3600))
        device, written = pool.create_layer("a", "64M").attach().device, list[int]()
        writer = in_background(lambda: written.append(write_directly(device)))
        wait_until(lambda: waiting(pool) > 0)
        take_over(pool_path).close()
        wait_until(lambda: waiting(pool) > 0)
        assert written == []
        pool.set_capacity("64M")
        writer.join()
        assert written == [MIB] and pool.layer("a").pread(MIB, 0) == b"a" * MIB
        pool.layer("a").detach()


def test_a_policy_that_makes_no_sense_is_no_reason_for_a_write_to_fail(tmp_path: Path) -> None:
    command = Command(tmp_path)
    with thinpool.Pool.create(command.pool) as pool:
        pool.put_document("policy", b'{"wait": 1, "of a later version": 2}')
    with thinpool.Pool.open(command.pool) as pool:
        pool.create_layer("a", "64M").pwrite(b"a" * MIB, 0)
        with pytest.raises(thinpool.DamagedError, match="policy"):
            pool.policy()
    _, message = command.fails("policy")
    assert "set another one" in message
    command("policy", "--wait", "2")
    with thinpool.Pool.open(command.pool) as pool:
        assert pool.policy() == thinpool.Policy(wait=2)
