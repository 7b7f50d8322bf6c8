"""NBD over a Unix socket: fio and nbdcopy against nbdkit's file plugin on a raw sparse file, on the same disk."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Row

import thinpool

_SIZE = 512 << 20
_ROUNDS = 5
_SECONDS = 2


@contextmanager
def nbdkit(image: Path, socket: Path) -> Iterator[str]:
    """nbdkit's file plugin on an image; its URI."""
    with subprocess.Popen(["nbdkit", "-f", "-U", socket, "file", image]) as process:
        try:
            while not socket.exists():
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            process.terminate()
    socket.unlink(missing_ok=True)


def fio(uri: str, options: str) -> float:
    """Operations a second."""
    command = f"fio --name=x --ioengine=nbd --uri={uri} --size={_SIZE} --randrepeat=0 --output-format=json {options}"
    done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


@pytest.mark.parametrize(
    ("case", "options", "filled"),
    [
        ("4 KiB random reads, depth 16", f"--rw=randread --bs=4k --iodepth=16 --time_based --runtime={_SECONDS}", True),
        ("4 KiB random overwrites, depth 16", f"--rw=randwrite --bs=4k --iodepth=16 --time_based --runtime={_SECONDS}", True),
        ("first writes of 64 KiB, depth 4", "--rw=write --bs=64k --iodepth=4", False),
    ],
)
def test_fio_against_nbdkit(place: Path, row: Row, case: str, options: str, filled: bool) -> None:
    ratios = []
    for number in range(_ROUNDS):
        image = place / "image"
        with image.open("wb") as file:
            file.truncate(_SIZE)
        with thinpool.Pool.create(place / f"pool-{number}") as pool, nbdkit(image, place / "theirs") as theirs:
            pool.create_layer("disk", _SIZE)
            pool.serve_nbd(f"unix:{place}/ours")
            ours = f"nbd+unix:///disk?socket={place}/ours"
            for uri in (ours, theirs) if filled else ():
                fio(uri, "--rw=write --bs=1m --iodepth=4")
            pool.commit()
            results = [fio(uri, options) for uri in ((ours, theirs) if number % 2 else (theirs, ours))]
            ratios.append(results[0] / results[1] if number % 2 else results[1] / results[0])
    row(f"NBD: {case}", statistics.median(ratios), 1, "of nbdkit on a raw file")


def test_nbdcopy_against_nbdkit(place: Path, row: Row) -> None:
    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    ratios = []
    with thinpool.Pool.create(place / "pool") as pool:
        with (place / "image").open("wb") as file:
            file.truncate(_SIZE)
        with nbdkit(place / "image", place / "theirs") as theirs:
            pool.create_layer("disk", _SIZE)
            pool.serve_nbd(f"unix:{place}/ours")
            ours = f"nbd+unix:///disk?socket={place}/ours"
            for uri in (ours, theirs):
                fio(uri, "--rw=write --bs=1m --iodepth=4")
            for _ in range(_ROUNDS):
                taken = [seconds(lambda uri=uri: subprocess.run(["nbdcopy", uri, "null:"], check=True)) for uri in (ours, theirs)]
                ratios.append(taken[1] / taken[0])
    row("NBD: nbdcopy of it all", statistics.median(ratios), 1, "of nbdkit on a raw file")
