"""containerd on a pool, against its own snapshotters: the same containerd, image (a Debian root file system) and disk.

overlayfs is what containers have by default; native copies the whole tree for each, and takes fewer turns. What is removed is gone when
containerd has collected its garbage.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Row
from containerdworld import World, run, world

OURS, PEERS = "thinpool", ("overlayfs", "native")
SNAPSHOTTERS = (OURS, *PEERS)
IMAGE = "example.com/debian:1"
_ROUNDS, _ROUNDS_OF_NATIVE = 6, 2
_MIB_WRITTEN = 512


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compared(row: Row, case: str, measured: dict[str, list[float]], targets: dict[str, float], *, unit: str = "s", scale: float = 1) -> None:
    """A row per peer: how many times as fast we are, by medians."""
    median = {name: statistics.median(values) for name, values in measured.items()}
    for peer in PEERS:
        note = f"{median[OURS] * scale:.3g} {unit}, {median[peer] * scale:.3g} {unit}"
        row(case, median[peer] / median[OURS], targets[peer], f"times as fast as {peer}", note=note)


def turns(rounds: int) -> Iterator[tuple[int, str]]:
    for number in range(rounds):
        yield from ((number, name) for name in SNAPSHOTTERS if name != "native" or number < _ROUNDS_OF_NATIVE)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("containerd")
    with world(directory) as here:
        run("skopeo", "copy", f"oci:{layout}:x", f"oci-archive:{directory}/image.tar:{IMAGE}")
        here.ctr("images", "import", "--no-unpack", directory / "image.tar")
        (directory / "image.tar").unlink()
        unpack(here)
        yield here
        here.remove_all()


def unpack(here: World) -> dict[str, list[float]]:
    """Unpacks the image for all snapshotters, several times; seconds."""
    taken: dict[str, list[float]] = {name: [] for name in SNAPSHOTTERS}
    digest = here.ctr("images", "list").splitlines()[1].split()[2]
    for _ in range(3):
        for name in SNAPSHOTTERS:
            for key in keys(here, name)[::-1]:
                here.ctr("snapshots", "--snapshotter", name, "remove", key)
            run("sync")
            taken[name].append(seconds(lambda name=name: (here.ctr("snapshots", "unpack", "--snapshotter", name, digest), run("sync"))))
    return taken


def keys(here: World, snapshotter: str) -> list[str]:
    lines = here.ctr("snapshots", "--snapshotter", snapshotter, "list").splitlines()[1:]
    return [line.split()[0] for line in lines]


def test_unpacking(here: World, row: Row) -> None:
    compared(row, "unpacking the image, with what it takes to be on disk", unpack(here), {"overlayfs": 0.5, "native": 0.5})


def first_output(here: World, snapshotter: str, name: str) -> float:
    """Seconds from the command to the first line that the container prints."""
    command = here.ctr_words("run", "--rm", "--snapshotter", snapshotter, IMAGE, name, "/bin/echo", "hello")
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hello\n"
        taken = time.perf_counter() - start
        assert process.wait() == 0
    return taken


def test_from_run_to_first_output(here: World, row: Row) -> None:
    taken: dict[str, list[float]] = {name: [] for name in SNAPSHOTTERS}
    for number, name in turns(2 * _ROUNDS):
        taken[name].append(first_output(here, name, f"hello-{name}-{number}"))
    compared(row, "ctr run to first output", taken, {"overlayfs": 0.75, "native": 2}, unit="ms", scale=1000)


def test_writing_and_removing(here: World, row: Row) -> None:
    writing: dict[str, list[float]] = {name: [] for name in SNAPSHOTTERS}
    removing: dict[str, list[float]] = {name: [] for name in SNAPSHOTTERS}
    dd = f"dd if=/dev/zero bs=1M count={_MIB_WRITTEN} conv=fsync of=/file status=none"
    for number, name in turns(_ROUNDS):
        container = f"writes-{name}-{number}"
        here.ctr("run", "--detach", "--null-io", "--snapshotter", name, IMAGE, container, "/bin/sleep", "1000")
        writing[name].append(seconds(lambda container=container: here.execute(container, dd)) / _MIB_WRITTEN)
        here.end_task(container)
        removing[name].append(seconds(lambda container=container: (here.ctr("containers", "delete", container), here.ctr("content", "prune", "references"))))
    compared(row, f"a new file of {_MIB_WRITTEN} MiB, with fsync", writing, {"overlayfs": 0.8, "native": 0.8}, unit="ms per MiB", scale=1000)
    compared(row, "removing that container", removing, {"overlayfs": 1, "native": 1}, unit="ms", scale=1000)
