"""Layers as block devices: what the device can do, who may use it, and that nothing is left behind."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import needs_root, needs_tool

import thinpool

MIB = 1 << 20


def in_use(pool_path: Path) -> list[str]:
    """What the kernel still holds for a pool."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(pool_path) in line]
    loops = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            loops += [str(file)] if str(pool_path) in file.read_text() else []
        except OSError:
            continue
    return mounts + loops


def queue(device: str, name: str) -> int:
    return int(Path("/sys/block", Path(device).name, "queue", name).read_text())


def size_of(device: str) -> int:
    with open(device, "rb") as file:
        return file.seek(0, os.SEEK_END)


def write_through(device: str, data: bytes) -> None:
    """Writes to a device's begin; closing it alone would do only where nobody else, like a program that looks for file systems, has it open."""
    with open(device, "r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@needs_root()
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_device_is_the_layer(pool: thinpool.Pool, sector_size: int) -> None:
    layer = pool.create_layer("library/disk", 16 * MIB)
    device = layer.attach(sector_size=sector_size).device
    assert (queue(device, "logical_block_size"), size_of(device)) == (sector_size, 16 * MIB)
    assert Path("/sys/block", Path(device).name, "loop/dio").read_text() == "1\n"
    descriptor = os.open(device, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 2 * MIB) as memory:
        data = os.urandom(2 * MIB)
        memory[:] = data
        assert os.pwritev(descriptor, [memory], MIB) == 2 * MIB
        assert layer.pread(2 * MIB, MIB) == data
    os.close(descriptor)
    layer.detach()
    assert pool.attachments() == []


@needs_root()
@needs_tool("blkdiscard")
def test_a_discard_gives_space_back(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", 16 * MIB)
    layer.pwrite(os.urandom(16 * MIB), 0)
    device = layer.attach().device
    assert queue(device, "discard_granularity") == 4096
    subprocess.run(["blkdiscard", "-o", str(4 * MIB), "-l", str(8 * MIB), device], check=True)
    assert layer.usage().mapped == 8 * MIB
    assert layer.pread(8 * MIB, 4 * MIB) == bytes(8 * MIB)
    subprocess.run(["blkdiscard", "-z", device], check=True)
    assert layer.pread(16 * MIB, 0) == bytes(16 * MIB)


@needs_root()
def test_a_sealed_layer_is_a_read_only_device(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    layer.pwrite(b"kept", 0)
    device = layer.snapshot("snap").attach().device
    with open(device, "rb") as file:
        assert file.read(4) == b"kept"
    descriptor = os.open(device, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"lost", 0)
    os.close(descriptor)


@needs_root()
def test_a_device_follows_a_resize(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    device = layer.attach().device
    layer.resize(3 * MIB)
    assert size_of(device) == 3 * MIB


@needs_root()
def test_a_layer_has_one_use_at_a_time(pool: thinpool.Pool, tmp_path: Path) -> None:
    layer = pool.create_layer("disk", MIB)
    device = layer.attach().device
    with pytest.raises(thinpool.LayerBusy, match=device):
        layer.attach()
    with pytest.raises(thinpool.LayerBusy, match=device):
        layer.delete()
    with pytest.raises(thinpool.LayerState, match="not mounted"):
        layer.unmount()
    layer.detach()
    with pytest.raises(thinpool.LayerState, match="not attached"):
        layer.detach()
    layer.delete()


@needs_root()
def test_a_detach_of_an_open_device_says_who_has_it(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    device = layer.attach().device
    with open(device, "rb") as file:
        sleeper = subprocess.Popen(["sleep", "60"], stdin=file)
    with pytest.raises(thinpool.LayerBusy, match=rf"sleep \(pid {sleeper.pid}\)"):
        layer.detach()
    sleeper.kill()
    sleeper.wait()
    write_through(device, b"goes on")
    assert layer.pread(7, 0) == b"goes on"
    layer.detach()


@needs_root()
@pytest.mark.parametrize(("size", "sector_size", "error"), [(MIB, 1024, thinpool.BadSize), (MIB + 512, 4096, thinpool.LayerState)])
def test_sizes_that_do_not_fit_are_refused(pool: thinpool.Pool, size: int, sector_size: int, error: type[Exception]) -> None:
    layer = pool.create_layer("disk", size)
    with pytest.raises(error):
        layer.attach(sector_size=sector_size)
    assert pool.attachments() == []


@needs_root()
def test_it_goes_when_its_owner_ends(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("disk", MIB)
    owner = subprocess.Popen(["sleep", "60"])
    assert layer.attach(owner=owner.pid).owner == owner.pid
    owner.kill()
    owner.wait()
    wait_until(lambda: pool.attachments() == [])
    for pid in (owner.pid, -1, 1 << 31, 1 << 80):
        with pytest.raises(thinpool.LayerState, match="no process"):
            layer.attach(owner=pid)
    layer.attach()


@needs_root()
def test_many_at_once_get_a_device_each(pool: thinpool.Pool) -> None:
    layers = [pool.create_layer(f"disk{i}", MIB) for i in range(12)]
    with ThreadPoolExecutor(12) as threads:
        for _ in range(3):
            devices = list(threads.map(lambda layer: layer.attach().device, layers))
            assert len(set(devices)) == len(layers)
            for layer, device in zip(layers, devices, strict=True):
                write_through(device, layer.name.encode())
                assert layer.pread(len(layer.name), 0) == layer.name.encode()
            list(threads.map(lambda layer: layer.detach(), layers))
    assert pool.attachments() == []


@needs_root()
def test_closing_takes_everything_down(pool: thinpool.Pool) -> None:
    for i in range(4):
        pool.create_layer(f"disk{i}", MIB).attach()
    assert len(in_use(pool.path)) == 5
    pool.close()
    assert in_use(pool.path) == []


# The load comes from a process of its own, which dies with its parent: one that is killed while it waits for files that it
# serves itself cannot end before its guard has seen to that.
WRITER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
with open(sys.argv[1], "wb", buffering=0) as file:
    print("writing", flush=True)
    while os.getppid() == int(sys.argv[2]):  # else it ended before the call above
        file.write(bytes(1 << 20))
        file.seek(0)
"""
VICTIM = f"""
import os, subprocess, sys, thinpool
pool = thinpool.Pool.open(sys.argv[1])
print(pool.layer("disk").attach().device, flush=True)
print(pool.layer("files").mount(sys.argv[2]).mountpoint, flush=True)
subprocess.Popen([sys.executable, "-c", {WRITER!r}, sys.argv[2] + "/file", str(os.getpid())], stderr=subprocess.DEVNULL).wait()
"""


@needs_root()
@needs_tool("mkfs.ext4")
@pytest.mark.parametrize("guard_too", [False, True])
def test_a_killed_process_leaves_nothing(pool_path: Path, tmp_path: Path, guard_too: bool) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        pool.create_layer("disk", MIB)
        layer = pool.create_layer("files", 64 * MIB)
        subprocess.run(["mkfs.ext4", "-q", layer.attach().device], check=True)
    directory = tmp_path / "mnt"
    directory.mkdir()
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(pool_path), str(directory)], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    assert victim.stdout.readline().startswith("/dev/loop")
    assert victim.stdout.readline().strip() == str(directory)
    guards = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
    assert victim.stdout.readline() == "writing\n"
    if guard_too:
        for guard in guards:
            os.kill(int(guard), signal.SIGKILL)
    victim.kill()
    victim.wait()
    victim.stdout.close()
    if not guard_too:
        wait_until(lambda: in_use(pool_path) == [] and not any(Path("/proc", guard).exists() for guard in guards))
    with thinpool.Pool.open(pool_path) as pool:  # clears what nobody else did
        pool.layer("disk").attach()
        assert len(in_use(pool_path)) == 2
        pool.layer("files").mount(directory)
    assert in_use(pool_path) == []
    assert list(directory.iterdir()) == []


NOBODY = """
import os, sys, thinpool, thinpool.exports  # while it may read them, wherever Python lies
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with thinpool.Pool.create(sys.argv[1]) as pool:
    layer = pool.create_layer("disk", "1M")
    for use in (layer.attach, lambda: pool.uses.files()):
        try:
            use()
        except thinpool.NeedsRoot as error:
            print(error)
"""


@needs_root()
def test_without_root_it_says_what_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tempfile.mkdtemp()  # which, unlike pytest's, others can be let into
    try:
        os.chown(directory, 65534, 65534)
        ran = subprocess.run([sys.executable, "-c", NOBODY, f"{directory}/pool"], check=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(directory)
    assert ran.stdout.count("need root") == 2
    assert "export_raw" in ran.stdout


WITHOUT_NBD = """
import sys, thinpool
with thinpool.Pool.create(sys.argv[1]) as pool:
    try:
        pool.create_layer("disk", "1M").attach(via="nbd")
    except thinpool.ToolFailed as error:
        print(error, pool.attachments())
"""


@needs_root()
@needs_tool("unshare")
def test_without_nbd_in_the_kernel_it_says_so(pool_path: Path) -> None:
    # Where the kernel has it, it is not seen from another network namespace.
    ran = subprocess.run(["unshare", "--net", sys.executable, "-c", WITHOUT_NBD, pool_path], check=True, capture_output=True, text=True)
    assert ran.stdout == "no nbd devices here, or not in this network namespace: modprobe nbd, or attach via loop []\n"


@needs_root()
def test_there_is_no_third_kind_of_device(pool: thinpool.Pool) -> None:
    with pytest.raises(thinpool.LayerState, match="via loop or nbd"):
        pool.create_layer("disk", MIB).attach(via="tape")  # type: ignore[arg-type]


@needs_root()
@needs_tool("fio")
def test_fio_reads_back_what_it_wrote(pool: thinpool.Pool, tmp_path: Path) -> None:
    pool.create_layer("base", 64 * MIB).snapshot("snap").clone("disk")
    device = pool.layer("disk").attach().device
    job = f"--name=verify --filename={device} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-256k --verify=crc32c --size=64m"
    subprocess.run(["fio", *job.split()], check=True, capture_output=True, timeout=120, cwd=tmp_path)
