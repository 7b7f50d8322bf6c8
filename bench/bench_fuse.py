"""A layer as a block device (FUSE and loop): fio against a loop device on a raw sparse file, which is the limit, and against one on a plain file
that libfuse's low-level interface passes through (passthrough.c), all three on the same disk and in turns."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Row

import thinpool
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect, take_over

_SIZE = 512 << 20
_ROUNDS = 5
_SECONDS = 2


@pytest.fixture(scope="module")
def passthrough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("passthrough") / "passthrough"
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True).stdout.split()
    source = Path(__file__).with_name("passthrough.c")
    subprocess.run(["cc", "-O2", "-o", str(program), str(source), *flags], check=True)
    return program


def sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(_SIZE)
    return path


@contextmanager
def loop_on(file: Path, *, cached: bool = False) -> Iterator[str]:
    """``cached``: through the page cache, from which a layer's data comes too; else with direct I/O, as a layer's device."""
    command = ["losetup", "-f", "--show", f"--direct-io={'off' if cached else 'on'}", str(file)]
    device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@contextmanager
def passed_through(program: Path, image: Path, place: Path) -> Iterator[str]:
    place.mkdir()
    with subprocess.Popen([program, image, place]) as process:
        try:
            while not (place / "file").exists():
                time.sleep(0.01)
            with loop_on(place / "file") as device:
                yield device
        finally:
            subprocess.run(["umount", place], check=True)
            process.wait()


def fio(device: str, options: str) -> float:
    """Operations a second."""
    command = f"fio --name=x --ioengine=libaio --direct=1 --filename={device} --size={_SIZE} --randrepeat=0 --output-format=json {options}"
    done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


@pytest.mark.parametrize(
    ("case", "options", "target"),
    [
        ("4 KiB random reads, depth 16", "--rw=randread --bs=4k --iodepth=16", 0.55),
        ("4 KiB random writes, depth 16", "--rw=randwrite --bs=4k --iodepth=16", 0.55),
        ("1 MiB reads in sequence, depth 4", "--rw=read --bs=1m --iodepth=4", 0.6),
        ("1 MiB writes in sequence, depth 4", "--rw=write --bs=1m --iodepth=4", 0.6),
    ],
)
def test_loop_devices(place: Path, row: Row, passthrough: Path, case: str, options: str, target: float) -> None:
    timed = f"{options} --time_based --runtime={_SECONDS}"
    of_raw, of_peer = [], []
    with thinpool.Pool.create(place / "pool") as pool:
        layer = pool.create_layer("disk", _SIZE)
        ours = layer.attach().device
        with loop_on(sparse(place / "raw"), cached=True) as raw, passed_through(passthrough, sparse(place / "plain"), place / "fuse") as peer:
            devices = [ours, raw, peer]
            for device in devices:
                fio(device, "--rw=write --bs=64k --iodepth=4")
            for number in range(_ROUNDS):
                order = [(number + step) % 3 for step in range(3)]
                rates = {which: fio(devices[which], timed) for which in order}
                of_raw.append(rates[0] / rates[1])
                of_peer.append(rates[0] / rates[2])
        layer.detach()
    row(f"FUSE and loop: {case}", statistics.median(of_raw), target, "of a loop device on a raw file")
    row(f"FUSE and loop: {case}", statistics.median(of_peer), 1, "of one on a file passed through by libfuse")


def longest_write(device: str, meanwhile: Callable[[], object]) -> float:
    """Milliseconds that the longest of many direct writes of 4 KiB to a device took, while something is done to its server."""
    longest, ended = 0.0, threading.Event()

    def write() -> None:
        nonlocal longest
        descriptor, rng = os.open(device, os.O_RDWR | os.O_DIRECT), random.Random(1)
        with mmap.mmap(-1, 4096) as block:
            while not ended.is_set():
                begin = time.perf_counter()
                os.pwrite(descriptor, block, rng.randrange(_SIZE >> 12) << 12)
                longest = max(longest, time.perf_counter() - begin)
        os.close(descriptor)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        meanwhile()
    finally:
        ended.set()
        thread.join()
    return longest * 1000


def test_pauses(place: Path, row: Row) -> None:
    thinpool.Pool.create(place / "pool").close()
    with connect(place / "pool", server=True) as pool:
        assert isinstance(pool, RemotePool)
        device = pool.create_layer("disk", _SIZE).attach().device
        fio(device, "--rw=write --bs=64k --iodepth=4")

        def kill() -> None:
            os.kill(int((place / "pool/lock").read_text()), signal.SIGKILL)
            pool.usage()

        quiet = statistics.median(longest_write(device, lambda: time.sleep(0.5)) for _ in range(_ROUNDS))
        takeover = statistics.median(longest_write(device, lambda: take_over(place / "pool").close()) for _ in range(_ROUNDS))
        killed = statistics.median(longest_write(device, kill) for _ in range(_ROUNDS))
        pool.layer("disk").detach()
    row("longest write of 4 KiB during a takeover", takeover, 250, "ms", at_most=True, note=f"{quiet:.1f} ms without")
    row("longest write of 4 KiB when the server is killed", killed, 2000, "ms", at_most=True)
