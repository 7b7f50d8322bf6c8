"""NBD to the letter: clients by hand, and ones that lie, are slow, or vanish."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from nbdworld import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    ERROR_CHUNK,
    FAST_ZERO,
    FLUSH,
    FUA,
    GO,
    INFO,
    LIST,
    MIB,
    NO_HOLE,
    OFFSET_DATA,
    READ,
    REQ_ONE,
    SIZE,
    STARTTLS,
    STATUS,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    World,
    digest,
    negotiated,
    option,
    request,
    simple_reply,
    structured,
    structured_reply,
    take,
)  # fmt: skip

import thinpool


@pytest.fixture(params=[False, True], ids=["dirtied", "clone"])
def world(pool: thinpool.Pool, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(pool, tmp_path, siblings=request.param)
    yield made
    made.verify()


@pytest.fixture
def lone(pool: thinpool.Pool, tmp_path: Path) -> World:
    """A world without siblings, for what concerns connections rather than data."""
    return World(pool, tmp_path, siblings=False)


# --- what requests do ---


def test_wrong_requests_get_the_error_that_the_protocol_names(world: World) -> None:
    client = negotiated(world)
    cases = [
        (request(READ, SIZE, 512), 22), (request(WRITE, SIZE - 1, 512) + bytes(512), 28), (request(9, 0, 0), 22), (request(READ, 0, 512, flags=0x8000), 22),
        (request(WRITE, 0, 512, flags=0x40) + bytes(512), 22), (request(WRITE, 0, 33 * MIB) + bytes(33 * MIB), 22), (request(READ, 0, 33 * MIB), 22),
        (request(BLOCK_STATUS, 0, 512), 22), (request(WRITE_ZEROES, 0, 512, flags=NO_HOLE | FAST_ZERO), 95), (request(TRIM, SIZE, 1), 22),
        (request(WRITE_ZEROES, SIZE, 1), 28), (request(CACHE, SIZE, 1), 22), (request(READ, 1 << 63, 512), 22), (request(TRIM, 0, 512, flags=NO_HOLE), 22),
    ]  # fmt: skip
    before = digest(world.layer)
    for data, error in cases:
        client.sendall(data)
        assert simple_reply(client)[0] == error
    assert digest(world.layer) == before
    client.sendall(request(READ, 0, 512))
    assert simple_reply(client, 512) == (0, world.layer.pread(512, 0))
    client.sendall(request(READ, 0, 512, magic=1))
    assert client.recv(1) == b""


def test_a_sealed_layer_refuses_every_change(pool: thinpool.Pool, tmp_path: Path) -> None:
    world = World(pool, tmp_path, siblings=True)
    client = negotiated(world, b"snapshot")
    for data in (request(WRITE, 0, 512) + bytes(512), request(WRITE, 0, MIB) + bytes(MIB), request(TRIM, 0, 512), request(WRITE_ZEROES, 0, MIB)):
        client.sendall(data)
        assert simple_reply(client)[0] == 1
    world.verify()


def test_the_largest_request_that_is_offered(world: World) -> None:
    client, data = negotiated(world), random.Random(6).randbytes(SIZE)
    client.sendall(request(WRITE, 0, SIZE) + data)
    assert simple_reply(client) == (0, b"")
    client.sendall(request(READ, 0, SIZE))
    assert simple_reply(client, SIZE) == (0, data)


def test_a_read_may_come_in_pieces_unless_the_client_wants_it_whole(lone: World) -> None:
    client = structured(lone)
    for flags in (0, DF):
        client.sendall(request(READ, 4097, MIB, flags))
        chunks = structured_reply(client)
        assert all(chunk.kind == OFFSET_DATA for chunk in chunks) and (len(chunks) == 1) == (flags == DF)
        got = {struct.unpack(">Q", chunk.data[:8])[0]: chunk.data[8:] for chunk in chunks}
        assert b"".join(got[at] for at in sorted(got)) == lone.layer.pread(MIB, 4097) and min(got) == 4097
    client.sendall(request(READ, 0, 33 * MIB, DF))
    assert [(chunk.kind, chunk.data[:4]) for chunk in structured_reply(client)] == [(ERROR_CHUNK, struct.pack(">I", 75))]


def test_zeros_without_a_hole_take_space_and_others_give_it_back(world: World) -> None:
    client = structured(world, [b"base:allocation"])

    def status(flags: int = 0) -> list[tuple[int, ...]]:
        client.sendall(request(BLOCK_STATUS, MIB, 2 * MIB, flags))
        (chunk,) = structured_reply(client)
        assert chunk.kind == STATUS
        return list(struct.iter_unpack(">II", chunk.data[4:]))

    for kind, flags in ((WRITE_ZEROES, 0), (WRITE_ZEROES, FAST_ZERO), (TRIM, 0)):
        client.sendall(request(WRITE_ZEROES, MIB, 2 * MIB, NO_HOLE))
        assert simple_reply(client)[0] == 0 and status() == [(2 * MIB, 0)]
        client.sendall(request(kind, 2 * MIB, MIB, flags))
        assert simple_reply(client)[0] == 0 and status() == [(MIB, 0), (MIB, 3)] and status(REQ_ONE) == [(MIB, 0)]
    assert world.layer.pread(2 * MIB, MIB) == bytes(2 * MIB)


def test_trim_zeroes_its_ragged_ends_to_the_byte(world: World) -> None:
    client, image = negotiated(world), bytearray(world.layer.pread(SIZE, 0))
    for offset, length in ((1, 1), (4095, 2), (65_537, 200_001), (10 * MIB + 4095, 2 * MIB), (SIZE - 5, 5)):
        client.sendall(request(TRIM, offset, length))
        image[offset : offset + length] = bytes(length)
        assert simple_reply(client)[0] == 0
    assert world.layer.pread(SIZE, 0) == image


def test_a_flush_covers_what_other_connections_were_told_is_written(world: World) -> None:
    writer, flusher = negotiated(world), negotiated(world)
    world.layer.discard(0, SIZE)
    for at, length in ((0, 4096), (MIB, MIB)):
        writer.sendall(request(WRITE, at, length) + b"x" * length)
        assert simple_reply(writer)[0] == 0
        before = world.pool.engine.info()
        flusher.sendall(request(FLUSH, 0, 0))
        assert simple_reply(flusher)[0] == 0
        assert world.pool.engine.info().durable_txn >= (before.txn if before.dirty else before.durable_txn)


def test_many_flushes_at_once_are_each_answered(lone: World) -> None:
    client = negotiated(lone)
    client.sendall(b"".join(request(FLUSH, 0, 0, cookie=k) + request(WRITE, k * 512, 512, FUA, cookie=1000 + k) + bytes(512) for k in range(600)))
    replies = struct.iter_unpack(">IIQ", take(client, 1200 * 16))
    assert sorted(cookie for _, error, cookie in replies if error == 0) == [*range(600), *range(1000, 1600)]


def test_large_and_small_requests_in_flight_are_each_answered(world: World) -> None:
    """More large ones than the helper takes, with small ones and reads between them, and a disconnect behind them all."""
    client, image = negotiated(world), bytearray(world.layer.pread(SIZE, 0))
    said = b""
    for k in range(24):
        for at, length in ((k * MIB, 300_000), (k * MIB + 400_000, 4096), (k * MIB + 500_000, 33_000)):
            data = bytes([k + 1]) * length
            said += request(WRITE, at, length, cookie=at) + data
            image[at : at + length] = data
        said += request(TRIM, k * MIB + 600_000, 100_000, cookie=k * MIB + 600_000)
        image[k * MIB + 600_000 : k * MIB + 700_000] = bytes(100_000)
    sender = threading.Thread(target=client.sendall, args=(said + request(DISC, 0, 0),))
    sender.start()
    replies = take(client, 24 * 4 * 16)
    sender.join()
    assert client.recv(1) == b""
    assert len({cookie for _, error, cookie in struct.iter_unpack(">IIQ", replies) if error == 0}) == 24 * 4
    assert world.layer.pread(SIZE, 0) == image


# --- clients that vanish, are slow, or lie ---


def test_a_client_that_hangs_up_anywhere_in_its_negotiation(lone: World) -> None:
    name = struct.pack(">I", 4) + b"disk"
    said = struct.pack(">I", 3) + option(STRUCTURED) + option(LIST) + option(INFO, name + struct.pack(">HH", 1, 3)) + option(GO, name + bytes(2))
    for length in range(len(said) + 1):
        with lone.connect() as client:
            client.sendall(said[:length])
    assert simple_read(negotiated(lone)) == lone.layer.pread(512, 0)


def simple_read(client: socket.socket) -> bytes:
    client.sendall(request(READ, 0, 512))
    error, data = simple_reply(client, 512)
    assert error == 0
    return data


def test_a_write_that_never_came_whole_is_none(lone: World) -> None:
    before = digest(lone.layer)
    for length in (4096, 65_536, 2 * MIB):
        client = negotiated(lone)
        client.sendall(request(WRITE, MIB, length) + b"x" * (length - 1))
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert digest(lone.layer) == before


def test_a_client_that_says_a_byte_at_a_time(lone: World) -> None:
    client = lone.connect()
    name = struct.pack(">I", 4) + b"disk"
    for byte in struct.pack(">I", 3) + option(GO, name + bytes(2)) + request(WRITE, 7, 100) + b"y" * 100 + request(READ, 0, 512):
        client.sendall(bytes([byte]))
    take(client, 18 + 20 + 12 + 20)
    assert simple_reply(client) == (0, b"")
    assert simple_reply(client, 512) == (0, lone.layer.pread(512, 0))


def test_a_client_that_never_takes_its_replies_holds_up_nobody_else(lone: World) -> None:
    deaf, other = negotiated(lone), negotiated(lone)
    deaf.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            deaf.sendall(request(READ, 0, 8 * MIB) + request(WRITE, 0, 4096) + bytes(4096))
    other.sendall(request(WRITE, 20 * MIB, MIB) + b"z" * MIB + request(FLUSH, 0, 0))
    assert [simple_reply(other)[0] for _ in range(2)] == [0, 0]
    assert lone.layer.pread(MIB, 20 * MIB) == b"z" * MIB
    deaf.close()


def test_a_disconnect_has_no_reply_whatever_its_flags(lone: World) -> None:
    for flags in (0, FUA, 0x8000):
        client = negotiated(lone)
        client.sendall(request(DISC, 0, 0, flags) + request(READ, 0, 512))
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_a_payload_beyond_measure_ends_that_connection_only(lone: World) -> None:
    other = negotiated(lone)
    client = negotiated(lone)
    client.sendall(request(WRITE, 0, 0xFFFFFFFF) + bytes(4096))
    with suppress(ConnectionResetError):
        assert client.recv(1) == b""
    assert simple_read(other) == lone.layer.pread(512, 0)


def test_many_at_once_with_bad_ones_among_them(world: World) -> None:
    idle = [world.connect() for _ in range(50)]  # never say a word
    half = [negotiated(world) for _ in range(50)]
    for client in half:
        client.sendall(request(WRITE, 0, 4096)[:20])  # a request cut short
    good = [negotiated(world) for _ in range(100)]
    errors: list[BaseException] = []

    def use(number: int, client: socket.socket) -> None:
        try:
            data, place = bytes([number]) * 4096, MIB + number * 4096
            for _ in range(20):
                client.sendall(request(WRITE, place, 4096) + data + request(READ, place, 4096))
                answer = take(client, 16 + 16 + 4096)
                assert answer[32:] == data
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number, client)) for number, client in enumerate(good)]
    for thread in threads:
        thread.start()
    for client in half[::2] + idle[::2]:
        client.close()
    for thread in threads:
        thread.join()
    assert not errors
    world.layer.pool.close()  # ends them all
    for client in (*good, *half[1::2], *idle[1::2]):
        with suppress(ConnectionResetError):
            while client.recv(4096):
                continue
        client.close()
    world.others = []
    world.digests = []


@pytest.mark.parametrize("seed", range(4))
def test_noise_hurts_nobody(world: World, seed: int) -> None:
    """Random bytes, and true messages with a byte or a length changed, in negotiation and transmission."""
    rng = random.Random(seed)
    steady, before = negotiated(world), digest(world.layer)
    for _ in range(150):
        name = b"disk"
        true = [
            option(kind, data)
            for kind, data in (
                (STRUCTURED, b""), (LIST, b""), (10, struct.pack(">I4sII15s", 4, name, 1, 15, b"base:allocation")), (STARTTLS, b""),
                (9, struct.pack(">I4sI", 4, name, 0)), (INFO, struct.pack(">I4sHHH", 4, name, 2, 1, 3)), (GO, struct.pack(">I4sH", 4, name, 0)),
            )
        ]  # fmt: skip
        noise = bytearray(struct.pack(">I", 3) + b"".join(rng.sample(true, rng.randrange(1, len(true)))) + true[-1])
        noise += request(READ, rng.getrandbits(20), rng.getrandbits(12)) + request(BLOCK_STATUS, 0, 4096) + rng.randbytes(rng.randrange(100))
        for _ in range(rng.randrange(4)):
            noise[rng.randrange(len(noise))] = rng.getrandbits(8)
        with world.connect() as client:
            client.settimeout(0.2)
            with suppress(OSError):
                client.sendall(noise)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    continue
        simple_read(steady)
    steady.close()
    assert digest(world.layer) == before
