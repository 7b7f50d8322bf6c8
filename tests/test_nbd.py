"""NBD: real clients, and ones that lie, are slow, or vanish."""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import needs_tool

import thinpool
from thinpool.exports.nbd.tls import tls_context

pytestmark = needs_tool("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "nbdkit", "fio", "openssl")

MIB = 1 << 20
SIZE = 32 * MIB
GO, LIST, STARTTLS, STRUCTURED = 7, 3, 5, 8
ERROR = 1 << 31


def run(*command: str | Path, check: bool = True, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=60, cwd=cwd)
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


@pytest.fixture(params=[False, True], ids=["dirtied", "clone"])
def world(pool: thinpool.Pool, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(pool, tmp_path, siblings=request.param)
    yield made
    made.verify()


# --- real clients ---


def test_what_clients_see(world: World) -> None:
    found = run("nbdinfo", world.uri())
    for line in (
        "export-size: 33554432",
        "is_read_only: false",
        "can_multi_conn: true",
        "can_fast_zero: true",
        "base:allocation",
        "block_size_maximum: 33554432",
    ):
        assert line in found
    if world.others:
        assert "is_read_only: true" in run("nbdinfo", world.uri("snapshot"))
        assert run("nbdinfo", "--list", f"nbd+unix:///?socket={world.socket}").count('export="') == 4
    assert "for export: nothing" in run("nbdinfo", world.uri("nothing"), check=False)


def test_copies_and_the_map(world: World, tmp_path: Path) -> None:
    run("nbdcopy", world.uri(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == world.layer.pread(SIZE, 0)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", world.uri(), tmp_path / "out")
    (tmp_path / "new").write_bytes(random.Random(5).randbytes(SIZE))
    run("nbdcopy", "--flush", tmp_path / "new", world.uri())
    assert world.layer.pread(SIZE, 0) == (tmp_path / "new").read_bytes()
    world.layer.discard(MIB, 3 * MIB)
    ranges = [line.split() for line in run("nbdinfo", "--map", world.uri()).splitlines()]
    assert [(int(offset), int(length), int(kind)) for offset, length, kind, *_ in ranges] == [(0, MIB, 0), (MIB, 3 * MIB, 3), (4 * MIB, SIZE - 4 * MIB, 0)]


def test_what_changed_since_a_snapshot(pool: thinpool.Pool, tmp_path: Path) -> None:
    world = World(pool, tmp_path, siblings=False)
    before = world.layer.snapshot("monday")
    world.layer.pwrite(b"x" * 4096, 5 * MIB)
    world.layer.discard(10 * MIB, 128 << 10)
    found = {}
    for line in run("nbdinfo", f"--map=thinpool:changed-since:{before.name}", world.uri()).splitlines():
        offset, length, kind = map(int, line.split()[:3])
        found.update(dict.fromkeys(range(offset // 4096, (offset + length) // 4096), kind))
    assert found[5 * MIB // 4096] == 1 and sum(found.values()) <= 33 and len(found) == SIZE // 4096
    changed = {extent.offset // 4096 + k for extent in pool.diff(before, world.layer) for k in range(extent.length // 4096)}
    assert {block for block, kind in found.items() if kind} == changed


PROGRAM = """
import random
rng, size = random.Random({seed}), {size}
image = bytearray(h.pread(1 << 20, 0) + b"".join(h.pread(1 << 20, at) for at in range(1 << 20, size, 1 << 20)))
for _ in range(300):
    offset = rng.randrange(size)
    length = min(rng.choice((1, 511, 4096, 70_000, 300_000, 2_000_000)), size - offset)
    kind = rng.randrange(8)
    fua = nbd.CMD_FLAG_FUA if rng.random() < 0.05 else 0
    if kind < 3:
        data = rng.randbytes(length)
        h.pwrite(data, offset, fua)
        image[offset : offset + length] = data
    elif kind == 3:
        h.trim(length, offset, fua)
        image[offset : offset + length] = bytes(length)
    elif kind == 4:
        h.zero(length, offset, rng.choice((0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO)) | fua)
        image[offset : offset + length] = bytes(length)
    elif kind == 5:
        h.flush()
    elif kind == 6:
        h.cache(length, offset)
    assert h.pread(length, offset) == image[offset : offset + length]
for offset, length, what in ((size - 10, 11, "pread"), (size, 1, "trim"), (size - 1, 2, "zero")):
    h.set_strict_mode(0)
    try:
        getattr(h, what)(length, offset)
        raise SystemExit(what + " past the end")
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error
h.flush()
"""


@pytest.mark.parametrize("structured", [True, False])
def test_random_requests(world: World, structured: bool) -> None:
    program = f"import nbd\nh = nbd.NBD()\nh.set_request_structured_replies({structured})\nh.connect_uri({world.uri()!r})\n"
    run("/usr/bin/python3", "-c", program + PROGRAM.format(seed=3, size=SIZE))  # Debian's, which python3-libnbd is for


def test_fio_verifies_what_it_wrote(world: World, tmp_path: Path) -> None:
    job = f"--name=v --ioengine=nbd --uri={world.uri()} --rw=randwrite --bsrange=4k-256k --iodepth=16 --verify=crc32c --size=16m --fsync=64"
    run("fio", *job.split(), cwd=tmp_path)


def test_qemu_and_nbdkit_in_front(world: World, tmp_path: Path) -> None:
    commands = [
        "write -P 7 0 1M",
        "read -P 7 0 1M",
        "discard 4097 70000",
        "read -P 0 4097 70000",
        "write -z 2M 64k",
        "read -P 0 2M 64k",
        "aio_write -P 9 3M 1M",
        "flush",
    ]
    run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), world.uri())
    assert world.layer.pread(MIB, 3 * MIB) == b"\x09" * MIB
    front = tmp_path / "front.sock"
    with subprocess.Popen(["nbdkit", "-f", "-U", front, "nbd", f"uri={world.uri()}"]) as nbdkit:
        try:
            while not front.exists():
                assert nbdkit.poll() is None
            run("nbdcopy", f"nbd+unix:///?socket={front}", tmp_path / "through")
        finally:
            nbdkit.terminate()
    assert (tmp_path / "through").read_bytes() == world.layer.pread(SIZE, 0)


def test_flushed_writes_are_durable(pool_path: Path, tmp_path: Path) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        world = World(pool, tmp_path, siblings=False)
        before = pool.engine.info().durable_txn
        run("qemu-io", "-f", "raw", "-c", "write -f -P 7 0 64k", world.uri())
        assert pool.engine.info().durable_txn > before


# --- TLS ---


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server and a client that it vouches for."""
    directory = tmp_path_factory.mktemp("certificates")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    run(*new, "-subj", "/CN=authority", "-keyout", directory / "ca-key.pem", "-out", directory / "ca-cert.pem")
    for name in ("server", "client"):
        signed = ["-CA", directory / "ca-cert.pem", "-CAkey", directory / "ca-key.pem", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        run(*new, "-subj", "/CN=localhost", *signed, "-keyout", directory / f"{name}-key.pem", "-out", directory / f"{name}-cert.pem")
    return directory


@pytest.mark.parametrize("verify_peer", [False, True])
def test_over_tls(pool: thinpool.Pool, tmp_path: Path, certificates: Path, verify_peer: bool) -> None:
    world = World(pool, tmp_path, siblings=True)
    port = pool.serve_nbd("127.0.0.1:0", certificates=certificates, verify_peer=verify_peer).rpartition(":")[2]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        if verify_peer or name.startswith("ca"):
            shutil.copy(certificates / name, theirs)
    uri = f"nbds://localhost:{port}/disk?tls-certificates={theirs}"
    run("nbdcopy", uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == world.layer.pread(SIZE, 0)
    (tmp_path / "new").write_bytes(random.Random(5).randbytes(SIZE))
    run("nbdcopy", "--flush", tmp_path / "new", uri)
    assert world.layer.pread(SIZE, 0) == (tmp_path / "new").read_bytes()
    assert "TLS" in run("nbdinfo", f"nbd://localhost:{port}/disk", check=False)
    if verify_peer:
        (theirs / "client-cert.pem").unlink()
        (theirs / "client-key.pem").unlink()
        with pytest.raises(AssertionError):
            run("nbdcopy", uri, tmp_path / "out")
    world.verify()


def test_addresses_that_cannot_be(pool: thinpool.Pool, tmp_path: Path) -> None:
    for address in ("nowhere", "127.0.0.1:99999", ":10809", "unix:/no/such/directory/socket", f"unix:{tmp_path}/a\0b", "0.0.0.0:0", "[::]:0"):
        with pytest.raises(thinpool.BadAddress):
            pool.serve_nbd(address)
    (tmp_path / "server-cert.pem").write_text("x")
    (tmp_path / "server-key.pem").write_text("x")
    with pytest.raises((thinpool.BadAddress, OSError)):
        pool.serve_nbd("127.0.0.1:0", certificates=tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("alice:c0ffee\n")
    if hasattr(ssl.SSLContext, "set_psk_server_callback"):
        assert tls_context(None, keys, verify_peer=False) is not None
    else:
        with pytest.raises(thinpool.BadAddress, match="pre-shared keys need"):
            tls_context(None, keys, verify_peer=False)
    assert pool.nbd_addresses() == []


# --- uses ---


def test_a_layer_with_clients_is_in_use(pool: thinpool.Pool, tmp_path: Path) -> None:
    world = World(pool, tmp_path, siblings=True)
    client = negotiated(world)
    client.sendall(request(0, 0, 512))
    client.recv(16)
    for verb in (world.layer.delete, world.layer.reset, world.layer.seal):
        with pytest.raises(thinpool.LayerBusy, match="1 NBD client"):
            verb()
    client.close()
    while pool.uses.users(world.layer):
        pass
    world.layer.delete()


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(pool: thinpool.Pool, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    pool.serve_nbd(f"unix:{path}")
    with pytest.raises(thinpool.BadAddress, match="in use"):
        pool.serve_nbd(f"unix:{path}")
    assert path.stat().st_mode & 0o777 == 0o600


# --- clients by hand ---


def negotiated(world: World, name: bytes = b"disk") -> socket.socket:
    client = world.connect()
    assert client.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
    client.sendall(struct.pack(">I", 3) + struct.pack(">8sII", b"IHAVEOPT", 1, len(name)) + name)
    size, _ = struct.unpack(">QH", client.recv(10, socket.MSG_WAITALL))
    assert size == SIZE
    return client


def request(kind: int, offset: int, length: int, flags: int = 0, magic: int = 0x25609513) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, kind, 42, offset, length)


def test_wrong_requests_get_the_error_that_the_protocol_names(world: World) -> None:
    client = negotiated(world)
    cases = [
        (request(0, SIZE, 512), 22), (request(1, SIZE - 1, 512) + bytes(512), 28), (request(9, 0, 0), 22), (request(0, 0, 512, flags=0x8000), 22),
        (request(1, 0, 512, flags=0x40) + bytes(512), 22), (request(1, 0, 33 * MIB) + bytes(33 * MIB), 22), (request(0, 0, 33 * MIB), 75),
        (request(7, 0, 512), 22), (request(6, 0, 512, flags=18), 95), (request(4, SIZE, 1), 28), (request(0, 1 << 63, 512), 22),
    ]  # fmt: skip
    before = digest(world.layer)
    for data, error in cases:
        client.sendall(data)
        assert struct.unpack(">IIQ", client.recv(16, socket.MSG_WAITALL)) == (0x67446698, error, 42)
    assert digest(world.layer) == before
    client.sendall(request(0, 0, 512))
    assert struct.unpack(">IIQ", client.recv(16, socket.MSG_WAITALL))[1] == 0
    assert client.recv(512, socket.MSG_WAITALL) == world.layer.pread(512, 0)
    client.sendall(request(0, 0, 512, magic=1))
    assert client.recv(1) == b""


def test_many_at_once_with_bad_ones_among_them(world: World) -> None:
    idle = [world.connect() for _ in range(50)]  # never say a word
    half = [negotiated(world) for _ in range(50)]
    for client in half:
        client.sendall(request(1, 0, 4096)[:20])  # a request cut short
    good = [negotiated(world) for _ in range(100)]
    errors: list[BaseException] = []

    def use(number: int, client: socket.socket) -> None:
        try:
            data, place = bytes([number]) * 4096, MIB + number * 4096
            for _ in range(20):
                client.sendall(request(1, place, 4096) + data + request(0, place, 4096))
                answer = client.recv(16 + 16 + 4096, socket.MSG_WAITALL)
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
    option = struct.Struct(">8sII")
    for _ in range(150):
        name = b"disk"
        true = [
            option.pack(b"IHAVEOPT", kind, len(data)) + data
            for kind, data in (
                (STRUCTURED, b""), (LIST, b""), (10, struct.pack(">I4sII15s", 4, name, 1, 15, b"base:allocation")), (STARTTLS, b""),
                (9, struct.pack(">I4sI", 4, name, 0)), (6, struct.pack(">I4sHHH", 4, name, 2, 1, 3)), (GO, struct.pack(">I4sH", 4, name, 0)),
            )
        ]  # fmt: skip
        noise = bytearray(struct.pack(">I", 3) + b"".join(rng.sample(true, rng.randrange(1, len(true)))) + true[-1])
        noise += request(0, rng.getrandbits(20), rng.getrandbits(12)) + request(7, 0, 4096) + rng.randbytes(rng.randrange(100))
        for _ in range(rng.randrange(4)):
            noise[rng.randrange(len(noise))] = rng.getrandbits(8)
        with world.connect() as client:
            client.settimeout(0.2)
            with suppress(OSError):
                client.sendall(noise)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    continue
        steady.sendall(request(0, 0, 512))
        assert struct.unpack(">IIQ", steady.recv(528, socket.MSG_WAITALL)[:16]) == (0x67446698, 0, 42)
    steady.close()
    assert digest(world.layer) == before
