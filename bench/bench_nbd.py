"""NBD over a Unix socket, the same clients on the same disk in one run: against nbdkit's file plugin on a raw sparse file, and against qemu-nbd
on qcow2 with clusters of 64 KiB."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from conftest import Row

import thinpool

_SIZE = 256 << 20
_ROUNDS = 6  # even: each is first as often
_TIMED = "--time_based --runtime=1"
_FILL = "--rw=write --bs=1m --iodepth=4 --end_fsync=1"  # what follows is not to share the disk with it
_IN_NEW_CHUNKS = "--rw=write:60k --bs=4k --iodepth=16"  # one in each 64 KiB


@contextmanager
def served(socket: Path, *command: str | Path) -> Iterator[str]:
    """A server of others at that socket; its URI."""
    with subprocess.Popen(command) as process:
        try:
            while not socket.exists():
                assert process.poll() is None
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            process.terminate()
    socket.unlink(missing_ok=True)


@contextmanager
def nbdkit(place: Path) -> Iterator[str]:
    """On a new raw image."""
    with (place / "image").open("wb") as file:
        file.truncate(_SIZE)
    with served(place / "nbdkit", "nbdkit", "-f", "-U", place / "nbdkit", "file", place / "image") as uri:
        yield uri


@contextmanager
def qemu(place: Path, name: str, backing: str = "") -> Iterator[str]:
    """On a new qcow2 image, with another one behind it if that is named."""
    behind = ["-b", place / backing, "-F", "qcow2"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", *behind, place / name, str(_SIZE)], check=True)
    with served(place / "qemu", "qemu-nbd", "-t", "-f", "qcow2", "-k", place / "qemu", place / name) as uri:
        yield uri


@contextmanager
def ours(place: Path) -> Iterator[thinpool.Pool]:
    """A pool with a new layer ``disk``, served."""
    with thinpool.Pool.create(place / "pool") as pool:
        pool.create_layer("disk", _SIZE)
        pool.serve_nbd(f"unix:{place}/ours")
        yield pool


def our_uri(place: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={place}/ours"


def fio(uri: str, options: str) -> float:
    """Operations a second."""
    command = f"fio --name=x --ioengine=nbd --uri={uri} --size={_SIZE} --randrepeat=0 --output-format=json {options}"
    done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def copy(source: str | Path, target: str | Path) -> float:
    """Copies a second."""
    start = time.perf_counter()
    subprocess.run(["nbdcopy", source, target], check=True)
    return 1 / (time.perf_counter() - start)


def touch_memory() -> None:
    """Free memory that a virtual machine's host has taken back is faulted in anew where it is first touched, which takes longer than all that
    is measured here: so that nobody pays for it alone, it is touched, and freed, before whatever fills the page cache."""
    with mmap.mmap(-1, _SIZE + (64 << 20)) as memory:
        memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)


def ratio(number: int, mine: Callable[[], float], theirs: Callable[[], float]) -> float:
    """How many times as fast as theirs mine is, in a round of that number: each is first in turn."""
    figures = {}
    for measure in (mine, theirs) if number % 2 else (theirs, mine):
        touch_memory()
        figures[measure] = measure()
    return figures[mine] / figures[theirs]


def rounds(place: Path) -> Iterator[tuple[int, Path]]:
    """Numbers, each with a directory that goes when the next one begins."""
    for number in range(_ROUNDS):
        here = place / str(number)
        here.mkdir()
        yield number, here
        shutil.rmtree(here)


Theirs = Callable[[Path], AbstractContextManager[str]]


def on_filled(place: Path, theirs: Theirs, options: str) -> float:
    """The median ratio on a disk that is written, and durable."""
    with ours(place), theirs(place) as uri:
        for disk in (our_uri(place), uri):
            fio(disk, _FILL)
        return statistics.median(ratio(number, partial(fio, our_uri(place), options), partial(fio, uri, options)) for number in range(_ROUNDS))


def on_new(place: Path, theirs: Theirs, options: str) -> float:
    """The median ratio on disks that are new in each round."""
    ratios = []
    for number, here in rounds(place):
        with ours(here), theirs(here) as uri:
            ratios.append(ratio(number, partial(fio, our_uri(here), options), partial(fio, uri, options)))
    return statistics.median(ratios)


@pytest.mark.parametrize(
    ("case", "options", "measure"),
    [
        ("4 KiB random reads, depth 16", f"--rw=randread --bs=4k --iodepth=16 {_TIMED}", on_filled),
        ("1 MiB reads in order, depth 4", f"--rw=read --bs=1m --iodepth=4 {_TIMED}", on_filled),
        ("4 KiB random overwrites, depth 16", f"--rw=randwrite --bs=4k --iodepth=16 {_TIMED}", on_filled),
        ("64 KiB overwrites in order, depth 4", f"--rw=write --bs=64k --iodepth=4 {_TIMED}", on_filled),
        ("first writes of 64 KiB, depth 4", "--rw=write --bs=64k --iodepth=4", on_new),
        ("first writes of 4 KiB, each in a new 64 KiB, depth 16", _IN_NEW_CHUNKS, on_new),
    ],
)
def test_fio_against_nbdkit(place: Path, row: Row, case: str, options: str, measure: Callable[[Path, Theirs, str], float]) -> None:
    row(f"NBD: {case}", measure(place, nbdkit, options), 1, "of nbdkit on a raw file")


def test_nbdcopy_against_nbdkit(place: Path, row: Row) -> None:
    outward, inward = [], []
    with (place / "source").open("wb") as file:
        for _ in range(_SIZE >> 20):
            file.write(os.urandom(1 << 20))
    for number, here in rounds(place):
        with ours(here), nbdkit(here) as theirs:
            inward.append(ratio(number, partial(copy, place / "source", our_uri(here)), partial(copy, place / "source", theirs)))
            outward.append(ratio(number, partial(copy, our_uri(here), "null:"), partial(copy, theirs, "null:")))
    row("NBD: nbdcopy of it all, out of it", statistics.median(outward), 1, "of nbdkit on a raw file")
    row("NBD: nbdcopy into it, first writes", statistics.median(inward), 1, "of nbdkit on a raw file")


@pytest.mark.parametrize(
    ("case", "options", "measure", "target"),
    [
        ("4 KiB random reads, depth 16", f"--rw=randread --bs=4k --iodepth=16 {_TIMED}", on_filled, 1.3),
        ("4 KiB random overwrites, depth 16", f"--rw=randwrite --bs=4k --iodepth=16 {_TIMED}", on_filled, 1.7),
        ("first writes of 4 KiB, each in a new 64 KiB, depth 16", _IN_NEW_CHUNKS, on_new, 3),
    ],
)
def test_fio_against_qemu(place: Path, row: Row, case: str, options: str, measure: Callable[[Path, Theirs, str], float], target: float) -> None:
    row(f"NBD: {case}", measure(place, partial(qemu, name="disk.qcow2"), options), target, "times qemu-nbd on qcow2")


def test_a_fresh_clone_against_a_qcow2_overlay(place: Path, row: Row) -> None:
    ratios = []
    with ours(place) as pool:
        with qemu(place, "base.qcow2") as base:
            for uri in (our_uri(place), base):
                fio(uri, _FILL)
        snapshot = pool.layer("disk").snapshot("base")
        for number in range(_ROUNDS):
            snapshot.clone(f"clone-{number}")
            with qemu(place, f"clone-{number}.qcow2", backing="base.qcow2") as theirs:
                ratios.append(ratio(number, partial(fio, our_uri(place, f"clone-{number}"), _IN_NEW_CHUNKS), partial(fio, theirs, _IN_NEW_CHUNKS)))
    row("NBD: first writes of 4 KiB to a fresh clone, each in a new 64 KiB, depth 16", statistics.median(ratios), 5, "times qemu-nbd on a qcow2 overlay")
