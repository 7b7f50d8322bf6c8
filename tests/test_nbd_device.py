"""Layers as nbd devices of the kernel: by ``attach --via nbd``, and by nbd-client. In a guest, as few hosts have the module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import Command, wait_until
from conftest import needs_tool
from guesttests import in_guest

import thinpool
import thinpool.exports.nbd_device
from thinpool.exports.keeping.takedown import devices
from thinpool.server.connect import connect

pytestmark = [in_guest("nbd"), needs_tool("linux.uml", "gcc", "busybox", "mkfs.ext4", "e2fsck", "fio", "blkdiscard")]
MIB = 1 << 20


def run(*words: str | Path) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def queue(device: str, name: str) -> int:
    return int(Path("/sys/block", Path(device).name, "queue", name).read_text())


def size_of(device: str) -> int:
    with open(device, "rb") as file:
        return file.seek(0, os.SEEK_END)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device in use is said to be in use at once."""
    monkeypatch.setattr(thinpool.exports.nbd_device, "_PATIENCE_SECONDS", 0.0)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_device_is_the_layer(pool: thinpool.Pool, sector_size: int) -> None:
    layer = pool.create_layer("library/disk", 16 * MIB)
    device = layer.attach(via="nbd", sector_size=sector_size).device
    assert device.startswith("/dev/nbd")
    assert (queue(device, "logical_block_size"), size_of(device)) == (sector_size, 16 * MIB)
    data = os.urandom(2 * MIB)
    with open(device, "r+b", buffering=0) as file:
        file.seek(MIB)
        file.write(data)
        os.fsync(file.fileno())
        assert layer.pread(2 * MIB, MIB) == data
        file.seek(MIB)
        assert file.read(2 * MIB) == data
    layer.detach()
    assert (pool.attachments(), devices()) == ([], {})


def test_a_file_system_on_it_is_whole_and_mounts_again(pool: thinpool.Pool, tmp_path: Path, impatient: None) -> None:
    layer = pool.create_layer("disk", 64 * MIB)
    device = layer.attach(via="nbd").device
    run("mkfs.ext4", "-q", device)
    run("mount", device, tmp_path)
    data = os.urandom(8 * MIB)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(thinpool.LayerBusy, match="in use"):
        layer.detach()
    run("umount", tmp_path)
    run("e2fsck", "-fn", device)
    layer.detach()
    assert layer.mount(tmp_path, via="nbd").device.startswith("/dev/nbd")
    assert (tmp_path / "file").read_bytes() == data
    layer.unmount()
    assert devices() == {}


def test_a_detach_of_an_open_device_says_who_has_it(pool: thinpool.Pool, impatient: None) -> None:
    layer = pool.create_layer("disk", MIB)
    device = layer.attach(via="nbd").device
    with open(device, "rb") as file:
        sleeper = subprocess.Popen(["sleep", "60"], stdin=file)
    with pytest.raises(thinpool.LayerBusy, match=rf"sleep \(pid {sleeper.pid}\)"):
        layer.detach()
    sleeper.kill()
    sleeper.wait()
    with open(device, "r+b") as file:
        file.write(b"goes on")
    layer.detach()
    assert layer.pread(7, 0) == b"goes on"


def test_a_device_that_this_process_has_open_is_in_use(pool: thinpool.Pool, impatient: None) -> None:
    layer = pool.create_layer("disk", MIB)
    with open(layer.attach(via="nbd").device, "rb"), pytest.raises(thinpool.LayerBusy):
        layer.detach()


def test_a_sealed_layer_is_a_read_only_device(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    layer.pwrite(b"kept", 0)
    device = layer.snapshot("snap").attach(via="nbd").device
    with open(device, "rb") as file:
        assert file.read(4) == b"kept"
    with pytest.raises(PermissionError), open(device, "r+b") as file:
        file.write(b"lost")


def test_a_discard_gives_space_back(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", 16 * MIB)
    layer.pwrite(os.urandom(16 * MIB), 0)
    device = layer.attach(via="nbd").device
    run("blkdiscard", "-o", str(4 * MIB), "-l", str(8 * MIB), device)
    assert layer.usage().mapped == 8 * MIB
    assert layer.pread(8 * MIB, 4 * MIB) == bytes(8 * MIB)


def test_a_device_follows_a_resize(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    device = layer.attach(via="nbd").device
    layer.resize(3 * MIB)
    assert size_of(device) == 3 * MIB
    with open(device, "r+b") as file:
        file.seek(2 * MIB)
        file.write(b"in what grew")
    assert layer.pread(12, 2 * MIB) == b"in what grew"


def test_it_goes_when_its_owner_ends(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    owner = subprocess.Popen(["sleep", "60"])
    layer.attach(via="nbd", owner=owner.pid)
    owner.kill()
    owner.wait()
    wait_until(lambda: pool.attachments() == [] and devices() == {})


VICTIM = """
import sys, thinpool
pool = thinpool.Pool.open(sys.argv[1])
print(pool.layer("disk").attach(via="nbd").device, flush=True)
for directory in sys.argv[2:]:
    pool.layer("files").mount(directory, via="nbd")
print("done", flush=True)
sys.stdin.read()
"""


def start_victim(pool_path: Path, *directories: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that has a layer attached, and its device; and another one mounted there."""
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, pool_path, *directories], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    device = victim.stdout.readline().strip()
    assert victim.stdout.readline() == "done\n"
    return victim, device


def kill(victim: subprocess.Popen[str], *, guard_too: bool) -> None:
    if guard_too:
        for guard in Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split():
            os.kill(int(guard), signal.SIGKILL)
    victim.kill()
    victim.communicate()


@pytest.mark.parametrize("guard_too", [False, True])
def test_a_killed_process_leaves_nothing(pool_path: Path, tmp_path: Path, guard_too: bool) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        pool.create_layer("disk", MIB)
        layer = pool.create_layer("files", 64 * MIB)
        run("mkfs.ext4", "-q", layer.attach(via="nbd").device)
    directory = tmp_path / "mnt"
    directory.mkdir()
    victim, _ = start_victim(pool_path, directory)
    (directory / "file").write_bytes(bytes(MIB))  # which nobody will take from the page cache any more
    kill(victim, guard_too=guard_too)
    if not guard_too:
        wait_until(lambda: devices() == {})
    with thinpool.Pool.open(pool_path) as pool:  # clears what nobody else did
        pool.layer("disk").attach(via="nbd")
        assert len(devices()) == 1
        pool.layer("files").mount(directory, via="nbd")
    assert devices() == {}
    assert list(directory.iterdir()) == []


def test_fio_reads_back_what_it_wrote(pool: thinpool.Pool, tmp_path: Path) -> None:
    base = pool.create_layer("base", 16 * MIB)
    base.pwrite(os.urandom(8 * MIB), 12345)
    snap = base.snapshot("snap")
    before = snap.pread(16 * MIB, 0)
    device = snap.clone("disk").attach(via="nbd").device
    job = f"--name=verify --filename={device} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-256k --verify=crc32c --size=16m"
    run("fio", *job.split(), f"--aux-path={tmp_path}")
    assert snap.pread(16 * MIB, 0) == before


# Writes and fsyncs, and tells how often it did.
LOAD = """
import os, sys
with open(sys.argv[1], "wb", buffering=0) as file:
    for number in range(1 << 30):
        file.write(os.urandom(100_000))
        os.fsync(file.fileno())
        file.seek(number % 40 * 100_000)
        print(number, flush=True)
"""


def test_the_verb_makes_one_and_what_is_mounted_on_it_goes_on_when_the_server_is_killed(tmp_path: Path) -> None:
    command = Command(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    thinpool.Pool.create(command.pool).close()
    with connect(command.pool, server=True) as pool:
        layer = pool.create_layer("disk", 32 * MIB)
        device = command("attach", "disk", "--via", "nbd").strip()
        assert size_of(device) == 32 * MIB
        run("mkfs.ext4", "-q", device)
        layer.detach()
        layer.mount(place, via="nbd")
        with subprocess.Popen([sys.executable, "-c", LOAD, place / "file"], stdout=subprocess.PIPE) as load:
            assert load.stdout is not None
            for _ in range(3):
                assert load.stdout.readline() != b""
            os.kill(int((command.pool / "lock").read_text()), signal.SIGKILL)
            assert [one.mountpoint for one in pool.attachments()] == [str(place)]
            for _ in range(3):
                assert load.stdout.readline() != b""
            load.kill()
        layer.unmount()
        with thinpool.Pool.open(command.pool, read_only=True) as there:
            there.layer("disk").export_raw(tmp_path / "disk.img")
        run("e2fsck", "-fn", tmp_path / "disk.img")
        assert devices() == {}


@needs_tool("nbd-client")
@pytest.mark.parametrize("address", ["unix:/mnt/nbd.sock", "127.0.0.1:10809"])
def test_nbd_client_makes_one_of_an_export(pool: thinpool.Pool, tmp_path: Path, address: str) -> None:
    pool.create_layer("a/disk", 64 * MIB)
    pool.serve_nbd(address)
    where = ["-unix", address.removeprefix("unix:")] if address.startswith("unix:") else ["127.0.0.1", "10809"]
    connect = ["nbd-client", *where, "-N", "a/disk", "-C", "3", "/dev/nbd0"]
    data = os.urandom(4 * MIB)
    run(*connect)
    run("mkfs.ext4", "-q", "/dev/nbd0")
    run("mount", "/dev/nbd0", tmp_path)
    (tmp_path / "file").write_bytes(data)
    run("umount", tmp_path)
    run("nbd-client", "-d", "/dev/nbd0")
    run(*connect)
    run("e2fsck", "-fn", "/dev/nbd0")
    run("mount", "/dev/nbd0", tmp_path)
    assert (tmp_path / "file").read_bytes() == data
    run("umount", tmp_path)
    run("nbd-client", "-d", "/dev/nbd0")


@needs_tool("nbd-client")
def test_nbd_client_may_not_write_to_a_sealed_layer(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    layer.pwrite(b"kept", 0)
    layer.seal()
    pool.serve_nbd("unix:/mnt/nbd.sock")
    run("nbd-client", "-unix", "/mnt/nbd.sock", "-N", "disk", "/dev/nbd0")
    with open("/dev/nbd0", "rb") as file:
        assert file.read(4) == b"kept"
    with pytest.raises(PermissionError), open("/dev/nbd0", "r+b") as file:
        file.write(b"lost")
    run("nbd-client", "-d", "/dev/nbd0")
