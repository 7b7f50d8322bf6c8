"""NBD: real clients, TLS, and what a served layer is used for. Clients by hand are in test_nbd_protocol.py."""

from __future__ import annotations

import os
import random
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool
from nbdworld import MIB, SIZE, World, negotiated, request, run

import thinpool

pytestmark = needs_tool("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "nbdkit", "fio", "openssl")

NBDSH = ("/usr/bin/python3", "-m", "nbd")  # as nbdsh does, but by Debian's Python, which python3-libnbd is for


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


def test_both_contexts_at_once(pool: thinpool.Pool, tmp_path: Path) -> None:
    world = World(pool, tmp_path, siblings=False)
    world.layer.discard(0, SIZE)
    world.layer.snapshot("monday")
    world.layer.pwrite(b"x" * MIB, 5 * MIB)
    program = f"""
h.add_meta_context("base:allocation")
h.add_meta_context("thinpool:changed-since:monday")
h.connect_uri({world.uri()!r})
found = {{}}
h.block_status({SIZE}, 0, lambda context, offset, entries, error: found.__setitem__(context, entries))
assert found == {{"base:allocation": [{5 * MIB}, 3, {MIB}, 0, {26 * MIB}, 3], "thinpool:changed-since:monday": [{5 * MIB}, 0, {MIB}, 1, {26 * MIB}, 0]}}, found
"""
    run(*NBDSH, "-c", program)


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
for offset, length, what, wanted in ((size - 10, 11, "pread", "EINVAL"), (size, 1, "trim", "EINVAL"), (size - 1, 2, "zero", "ENOSPC")):
    h.set_strict_mode(0)
    try:
        getattr(h, what)(length, offset)
        raise SystemExit(what + " past the end")
    except nbd.Error as error:
        assert error.errno == wanted, error
h.flush()
"""


@pytest.mark.parametrize("structured", [True, False])
def test_random_requests(world: World, structured: bool) -> None:
    run(*NBDSH, "-c", f"h.set_request_structured_replies({structured})\nh.connect_uri({world.uri()!r})\n" + PROGRAM.format(seed=3, size=SIZE))


def test_fio_verifies_what_it_wrote(world: World) -> None:
    job = (
        f"--name=v --ioengine=nbd --uri={world.uri()} --rw=randwrite --bsrange=4k-256k --iodepth=16 --verify=crc32c --verify_state_save=0 --size=16m --fsync=64"
    )
    run("fio", *job.split())


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


def use_as_file(file: Path, image: bytearray) -> None:
    """Writes to a live file, punches holes with ragged ends into it, and reads it back.

    No process is started while it is open here: a new one closes its copy before Python lets go of the GIL, which the close (a flush) may need, for
    the layer behind the file is served by this process.
    """
    with file.open("r+b", buffering=0) as live:
        os.pwrite(live.fileno(), b"new" * 1000, 3 * MIB + 5)
        image[3 * MIB + 5 : 3 * MIB + 3005] = b"new" * 1000
    for offset, length in ((4 * MIB + 100, 3 * MIB), (9 * MIB, MIB), (12 * MIB + 4095, 2)):
        run("fallocate", "--punch-hole", "--offset", str(offset), "--length", str(length), file)
        image[offset : offset + length] = bytes(length)
    with file.open("r+b", buffering=0) as live:
        os.fsync(live.fileno())
        assert os.pread(live.fileno(), SIZE, 0) == image


@needs_root()
@needs_tool("nbdfuse", "fallocate", "fusermount3")
def test_holes_punched_through_nbdfuse(world: World, tmp_path: Path) -> None:
    image = bytearray(world.layer.pread(SIZE, 0))
    file = tmp_path / "live"
    file.touch()
    with subprocess.Popen(["nbdfuse", file, world.uri()]) as process:
        try:
            while file.stat().st_size != SIZE:
                assert process.poll() is None
            use_as_file(file, image)
        finally:
            run("fusermount3", "-u", file)
            process.wait()
    assert world.layer.pread(SIZE, 0) == image


@needs_root()
@needs_tool("qemu-storage-daemon", "fallocate")
def test_holes_punched_through_qemus_fuse_export(world: World, tmp_path: Path) -> None:
    image = bytearray(world.layer.pread(SIZE, 0))
    file = tmp_path / "live"
    file.touch()
    node = ["--blockdev", f"driver=nbd,node-name=disk,export=disk,server.type=unix,server.path={world.socket},discard=unmap"]
    export = ["--export", f"type=fuse,id=live,node-name=disk,mountpoint={file},writable=on"]
    with subprocess.Popen(["qemu-storage-daemon", *node, *export]) as process:
        try:
            while file.stat().st_size != SIZE:
                assert process.poll() is None
            use_as_file(file, image)
        finally:
            process.terminate()
            process.wait()
    assert world.layer.pread(SIZE, 0) == image


def test_flushed_writes_are_durable(pool_path: Path, tmp_path: Path) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        world = World(pool, tmp_path, siblings=False)
        before = pool.engine.info().durable_txn
        run("qemu-io", "-f", "raw", "-c", "write -f -P 7 0 64k", world.uri())
        assert pool.engine.info().durable_txn > before


# --- TLS ---


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


def test_over_tls_by_a_key(pool: thinpool.Pool, tmp_path: Path) -> None:
    """Where Python has it (3.13); elsewhere it is refused in words."""
    keys, other = tmp_path / "keys", tmp_path / "other"
    keys.write_text("# who: key\nalice:00112233445566778899aabbccddeeff\n")
    other.write_text("alice:ff112233445566778899aabbccddeeff\n")
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        with pytest.raises(thinpool.BadAddress, match="pre-shared keys need Python"):
            pool.serve_nbd("127.0.0.1:0", keys=keys)
        return
    world = World(pool, tmp_path, siblings=False)
    port = pool.serve_nbd("127.0.0.1:0", keys=keys).rpartition(":")[2]
    run("nbdcopy", f"nbds://alice@localhost:{port}/disk?tls-psk-file={keys}", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == world.layer.pread(SIZE, 0)
    with pytest.raises(AssertionError, match="TLS"):
        run("nbdcopy", f"nbds://alice@localhost:{port}/disk?tls-psk-file={other}", tmp_path / "out")


def test_addresses_that_cannot_be(pool: thinpool.Pool, tmp_path: Path) -> None:
    for address in ("nowhere", "127.0.0.1:99999", ":10809", "unix:/no/such/directory/socket", f"unix:{tmp_path}/a\0b", "0.0.0.0:0", "[::]:0"):
        with pytest.raises(thinpool.BadAddress):
            pool.serve_nbd(address)
    (tmp_path / "server-cert.pem").write_text("x")
    (tmp_path / "server-key.pem").write_text("x")
    (tmp_path / "keys").write_bytes(bytes(range(128, 256)))
    for files in ({"certificates": tmp_path}, {"certificates": tmp_path / "nothing"}, {"keys": tmp_path / "keys"}, {"keys": tmp_path / "nothing"}):
        with pytest.raises(thinpool.BadAddress):
            pool.serve_nbd("127.0.0.1:0", **files)
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
    with thinpool.Pool.create(tmp_path / "other") as other, pytest.raises(thinpool.BadAddress, match="in use"):
        other.serve_nbd(f"unix:{path}")
    assert pool.nbd_addresses() == [f"unix:{path}"]
    assert path.stat().st_mode & 0o777 == 0o600
