"""A server that is killed, or replaced: what is mounted, attached and served over NBD goes on, and nothing that was written is lost."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbdworld
import pytest
from commandline import Command, make_rootfs, wait_until
from conftest import needs_root, needs_tool

import thinpool
from thinpool.errors import LayerDeleted, ServerError
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect, take_over
from thinpool.server.survival import kept_pool
from thinpool.server.transport import Transport
from thinpool.trash import take_back, throw_away, thrown_away

MIB = 1 << 20
pytestmark = [needs_root(), needs_tool("mkfs.ext4", "e2fsck", "qemu-nbd", "fio")]


class Served:
    """A pool with a server, and what is done to that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        thinpool.Pool.create(path).close()
        pool = connect(path, server=True)
        assert isinstance(pool, RemotePool)
        self.pool = pool

    @property
    def pid(self) -> int:
        return int((self.path / "lock").read_text())

    def keeper(self) -> int:
        """The keeper's pid; 0: there is none."""
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                words = (directory / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if "keeping.keeper" in " ".join(words) and str(self.path / "run") in words:
                return int(directory.name)
        return 0

    def kill(self) -> None:
        """Kills it; returns when the next one serves."""
        before = self.pid
        os.kill(before, signal.SIGKILL)
        self.pool.usage()
        assert self.pid != before

    def close(self) -> None:
        """Ends server and keeper, whatever state they are in."""
        self.pool.close()
        with thinpool.connect(self.path) as pool:
            if isinstance(pool, RemotePool):
                os.kill(pool.server_pid, signal.SIGTERM)
        wait_until(lambda: not (self.path / "run/keeper.sock").exists())


@pytest.fixture
def served(pool_path: Path) -> Iterator[Served]:
    made = Served(pool_path)
    try:
        yield made
    finally:
        print((pool_path / "server.log").read_text())
        made.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "place"
    directory.mkdir()
    return directory


def mounted_ext4(served: Served, place: Path) -> None:
    layer = served.pool.create_layer("disk", 128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", layer.attach().device], check=True)
    layer.detach()
    layer.mount(place)


def test_certificates_that_are_gone_cost_nobody_a_file_system(served: Served, place: Path, certificates: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(certificates, tmp_path / "certificates")
    plain = served.pool.serve_http("127.0.0.1:0")
    secure = served.pool.serve_http("127.0.0.1:0", certificates=theirs)
    nbd = served.pool.serve_nbd("127.0.0.1:0", certificates=theirs)
    mounted_ext4(served, place)
    (place / "file").write_text("kept")
    theirs.rename(tmp_path / "elsewhere")
    served.kill()
    assert (place / "file").read_text() == "kept"
    assert (served.pool.http_addresses(), served.pool.nbd_addresses()) == ([plain], [])
    log = (served.path / "server.log").read_text()
    assert f"HTTP is not served at {secure} any more: cannot use the TLS files in {theirs}" in log
    assert f"NBD is not served at {nbd} any more: cannot use the TLS files in {theirs}" in log
    for address in (secure, nbd):
        host, _, port = address.rpartition(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))
    served.pool.layer("disk").unmount()


def descriptors_of(pid: int) -> int:
    """How many it has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def check(served: Served) -> None:
    layer = served.pool.layer("disk")
    subprocess.run(["e2fsck", "-fn", layer.attach().device], check=True, capture_output=True)
    layer.detach()


# Writes files over and over, and tells which content was fsynced. It dies with whoever started it.
LOAD = """
import ctypes, hashlib, os, random, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
rng = random.Random(int(sys.argv[2]))
while True:
    name = f"file{rng.randrange(12)}"
    data = rng.randbytes(rng.randrange(1, 400_000))
    print("begin", name, flush=True)
    with open(os.path.join(sys.argv[1], name), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    print("synced", name, hashlib.sha256(data).hexdigest(), flush=True)
"""


class Load:
    """The process that writes, and what it says that is on the file system."""

    def __init__(self, place: Path, seed: int, log: Path) -> None:
        self.place, self.log = place, log
        with log.open("w") as out:
            self.process = subprocess.Popen([sys.executable, "-c", LOAD, str(place), str(seed)], stdout=out, stderr=subprocess.STDOUT)

    def steps(self) -> int:
        return self.log.read_text().count("synced")

    def go_on(self) -> None:
        """Returns when it has written something more."""
        before = self.steps()
        wait_until(lambda: self.steps() > before + 1 or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()[-2000:]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def verify(self) -> None:
        """What was fsynced, and not begun anew since, reads back."""
        synced: dict[str, str] = {}
        for line in self.log.read_text().splitlines():
            words = line.split()
            assert words[0] in ("begin", "synced"), line
            if words[0] == "begin":
                synced.pop(words[1], None)
            elif len(words) == 3:
                synced[words[1]] = words[2]
        assert len(synced) > 5
        for name, digest in synced.items():
            assert hashlib.sha256((self.place / name).read_bytes()).hexdigest() == digest, name


@contextmanager
def load(place: Path, tmp_path: Path) -> Iterator[Load]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    running = Load(place, seed, tmp_path / "load.log")
    try:
        yield running
    finally:
        running.end()


def test_a_mounted_file_system_goes_on_when_its_server_is_killed(served: Served, place: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    mounted_ext4(served, place)
    with load(place, tmp_path) as running:
        for _ in range(int(request.config.getoption("--server-kills"))):
            running.go_on()
            time.sleep(random.random() / 4)  # at any moment, not at that of a step
            served.kill()
        running.go_on()
    running.verify()
    served.pool.layer("disk").unmount()
    check(served)


def test_a_takeover_is_not_noticed(served: Served, place: Path, tmp_path: Path) -> None:
    mounted_ext4(served, place)
    pids = {served.pid}
    with load(place, tmp_path) as running:
        for number in range(3):
            running.go_on()
            take_over(served.path).close()
            pids.add(served.pid)
            served.pool.create_layer(f"by-the-same-client-{number}", MIB)
        running.go_on()
    assert len(pids) == 4
    running.verify()
    served.pool.layer("disk").unmount()
    check(served)


def test_a_takeover_where_no_server_runs_starts_one(pool_path: Path) -> None:
    thinpool.Pool.create(pool_path).close()
    with take_over(pool_path) as pool:
        assert pool.layers() == []


def test_writes_that_nobody_flushed_are_there_after_kills(served: Served, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Through QEMU, which connects again and repeats what was not answered: what was is written only once."""
    served.pool.create_layer("base", 64 * MIB).pwrite(os.urandom(4 * MIB), 0)
    served.pool.layer("base").snapshot("snap").clone("disk")
    digest = hashlib.sha256(served.pool.layer("snap").pread(64 * MIB, 0)).hexdigest()
    served.pool.serve_nbd(f"unix:{tmp_path}/nbd")
    front = tmp_path / "front"
    options = f"driver=nbd,server.type=unix,server.path={tmp_path}/nbd,export=disk,reconnect-delay=60"
    qemu = subprocess.Popen(["qemu-nbd", "-k", str(front), "-t", "--image-opts", options])
    try:
        wait_until(front.exists)
        job = f"--name=v --ioengine=nbd --uri=nbd+unix:///?socket={front} --rw=randwrite --bsrange=4k-128k --size=64m --iodepth=8 --verify=crc32c"
        job += f" --verify_backlog=64 --randseed={random.randrange(1 << 31)} --rate_iops=400 --loops=100 --time_based --runtime=300"
        with subprocess.Popen(["fio", *job.split()], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
            try:
                for _ in range(int(request.config.getoption("--server-kills"))):
                    time.sleep(random.random() / 2)
                    served.kill()
                    assert fio.poll() is None, fio.stdout and fio.stdout.read()
            finally:
                fio.send_signal(signal.SIGINT)  # it verifies what it wrote, and ends
                said, _ = fio.communicate(timeout=120)
        assert fio.returncode in (0, 128) and "verify:" not in said and "err= 0" in said, said
    finally:
        qemu.terminate()
        qemu.wait()
    assert hashlib.sha256(served.pool.layer("snap").pread(64 * MIB, 0)).hexdigest() == digest


def test_a_layer_that_a_client_was_told_it_has_is_there_after_a_kill(served: Served, tmp_path: Path) -> None:
    served.pool.serve_nbd(f"unix:{tmp_path}/nbd")
    for name in ("by-export-name", "by-go"):
        served.pool.create_layer(name, MIB)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/nbd")
            assert nbdworld.take(client, 18)[:8] == b"NBDMAGIC"
            choice = nbdworld.option(nbdworld.EXPORT_NAME, name.encode())
            if name == "by-go":
                choice = nbdworld.option(nbdworld.GO, struct.pack(">I", len(name)) + name.encode() + bytes(2))
            client.sendall(struct.pack(">I", 3) + choice)
            last = nbdworld.take(client, 10 if name == "by-export-name" else 32 + 20)
            assert name == "by-export-name" or last.endswith(struct.pack(">III", nbdworld.GO, 1, 0)), last
            served.kill()
        assert served.pool.layer(name).size == MIB


def test_a_client_of_nbd_that_comes_to_a_pool_in_error_mode_reads(pool_path: Path, tmp_path: Path) -> None:
    thinpool.Pool.create(pool_path).close()
    with kept_pool(pool_path) as (pool, _):
        pool.create_layer("disk", MIB).pwrite(b"a" * 4096, 0)
        pool.serve_nbd(f"unix:{tmp_path}/nbd")
        pool.commit()
        pool.engine.fail()
        assert pool.usage().mode == "error"
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(f"{tmp_path}/nbd")
            assert nbdworld.take(client, 18)[:8] == b"NBDMAGIC"
            client.sendall(struct.pack(">I", 3) + nbdworld.option(nbdworld.EXPORT_NAME, b"disk"))
            assert struct.unpack(">QH", nbdworld.take(client, 10))[0] == MIB
            client.sendall(nbdworld.request(nbdworld.READ, 0, 4096))
            assert nbdworld.simple_reply(client, 4096) == (0, b"a" * 4096)
            client.sendall(nbdworld.request(nbdworld.WRITE, 0, 4096) + bytes(4096))
            assert nbdworld.simple_reply(client)[0] == errno.EIO
    wait_until(lambda: not (pool_path / "run/keeper.sock").exists())


def test_a_layer_is_in_the_trash_or_is_not_whenever_the_server_is_killed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the change after the lost one comes to the next server, and is committed there."""
    layer = served.pool.create_layer("disk", MIB)
    served.pool.commit()
    in_trash = f"trash/{layer.id}/disk", ["disk"]

    def look() -> tuple[str, list[str]]:
        return layer.name, [thrown.name for thrown in thrown_away(served.pool.layers())]

    def with_a_kill_after_the_first_change(verb: Callable[[], object]) -> None:
        ask = Transport._ask

        def ask_and_kill(self: Transport, method: str, *how: Any) -> bytes:
            answer = ask(self, method, *how)
            if method != "GET":
                monkeypatch.undo()
                served.kill()
            return answer

        monkeypatch.setattr(Transport, "_ask", ask_and_kill)
        verb()
        with connect(served.path) as again:
            again.commit()

    with_a_kill_after_the_first_change(lambda: throw_away(served.pool, layer, 1))
    assert look() in (("disk", []), in_trash)
    if look() != in_trash:
        throw_away(served.pool, layer, 1)
    with connect(served.path) as again:
        again.commit()
    with_a_kill_after_the_first_change(lambda: take_back(served.pool.layers(), "disk"))
    assert look() in (("disk", []), in_trash)


def test_what_belongs_to_nobody_goes(served: Served, tmp_path: Path) -> None:
    owner = subprocess.Popen(["sleep", "600"])
    for name in ("kept", "owned", "stray"):
        served.pool.create_layer(name, MIB)
    kept = served.pool.layer("kept").attach().device
    served.pool.layer("owned").attach(owner=owner.pid)
    file = served.path / "run/layers/stray"
    subprocess.run(["losetup", "-f", str(file)], check=True)  # as if killed in the midst of an attach
    os.kill(served.keeper(), signal.SIGSTOP)  # so that the owner ends while there is no server
    os.kill(served.pid, signal.SIGKILL)
    owner.kill()
    owner.wait()
    os.kill(served.keeper(), signal.SIGCONT)
    assert [(one.layer, one.device) for one in served.pool.attachments()] == [("kept", kept)]
    assert subprocess.run(["losetup", "-j", str(file)], capture_output=True, text=True, check=True).stdout == ""
    served.pool.layer("owned").delete()
    with pytest.raises(thinpool.LayerBusy):
        served.pool.layer("kept").delete()
    Path(kept).write_bytes(b"goes on")
    served.pool.layer("kept").detach()


def test_an_owner_is_watched_by_the_next_server(served: Served) -> None:
    owner = subprocess.Popen(["sleep", "600"])
    served.pool.create_layer("disk", MIB).attach(owner=owner.pid)
    for _ in range(2):  # and by the one after it
        served.kill()
        assert [one.owner for one in served.pool.attachments()] == [owner.pid]
    owner.kill()
    owner.wait()
    wait_until(lambda: served.pool.attachments() == [])


def test_a_layer_made_and_mounted_at_once_is_there(served: Served, place: Path) -> None:
    mounted_ext4(served, place)
    served.pool.layer("disk").unmount()
    served.pool.layer("disk").clone("clone").mount(place)
    served.kill()
    (place / "file").write_text("x")
    served.pool.layer("clone").unmount()


def test_a_commit_fails_where_a_killed_server_had_the_change(served: Served) -> None:
    base = served.pool.create_layer("base", MIB)
    served.pool.commit()
    lost = base.clone("lost")
    served.kill()
    base.set_labels({"by": "the next server"})
    for _ in range(2):
        with pytest.raises(ServerError, match="was killed"):
            served.pool.commit()
    with connect(served.path) as again:
        assert [layer.name for layer in again.layers()] == ["base"]
        another = again.create_layer("another", MIB)
        again.commit()
        served.kill()
        again.commit()  # nothing was open
        another.rename("renamed")
        again.commit()
    with pytest.raises(LayerDeleted):
        print(lost.name)


def test_a_commit_after_a_takeover_is_good_for_what_was_done_before(served: Served) -> None:
    served.pool.create_layer("base", MIB)
    take_over(served.path).close()
    served.pool.layer("base").snapshot("kept")
    served.pool.commit()
    served.kill()
    assert [layer.name for layer in served.pool.layers()] == ["base", "kept"]


def test_a_file_system_frozen_by_a_killed_server_is_thawed(served: Served, place: Path) -> None:
    mounted_ext4(served, place)
    (served.path / f"run/frozen-{served.pool.layer('disk').id}").touch()
    fd = os.open(place, os.O_RDONLY)
    fcntl.ioctl(fd, 0xC0045877, 0)  # FIFREEZE
    os.close(fd)
    served.kill()
    (place / "file").write_text("x")
    served.pool.layer("disk").unmount()


def test_a_killed_keeper_is_replaced(served: Served, place: Path) -> None:
    mounted_ext4(served, place)
    before = served.keeper()
    held = descriptors_of(before)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: (now := served.keeper()) not in (0, before) and descriptors_of(now) == held)
    served.kill()
    (place / "file").write_text("x")
    served.pool.layer("disk").unmount()
    check(served)


@needs_tool("crun")
def test_a_container_goes_on(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command("init")
    command("import", make_rootfs(tmp_path), "--name", "base", "--size", "256M")
    running = subprocess.Popen(
        command.words("run", "base", "--rm", "--name", "box", "--", "sh", "-c", "cat; echo kept > /file; cat /file"),
        env=command.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write("ready\n")
    running.stdin.flush()
    assert running.stdout.readline() == "ready\n"
    os.kill(int((command.pool / "lock").read_text()), signal.SIGKILL)
    said, _ = running.communicate("more\n", timeout=60)
    assert (said, running.returncode) == ("more\nkept\n", 0)
    wait_until(lambda: [layer["name"] for layer in command.json("ls")] == ["base"])
    wait_until(lambda: not (command.pool / "run/keeper.sock").exists())
