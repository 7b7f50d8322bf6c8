"""Images: how fast they are taken in and run, and what equal trees in different images share, by where blocks are put.

A Debian root file system (debootstrap, minbase) is the tree. The peers are umoci unpacking the same image, and containerd importing the same
archive into its overlayfs snapshotter, all on the same disk.
"""

from __future__ import annotations

import io
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Row

import thinpool
from thinpool.containers.run import run_container
from thinpool.filesystems.apply import apply_layer
from thinpool.filesystems.blank import blank_layer
from thinpool.filesystems.ext4 import Ext4
from thinpool.filesystems.ext4tree import Ext4Tree
from thinpool.sharing import share_equal_chunks

_ROUNDS = 3


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_load_against_umoci(layout: Path, place: Path, row: Row) -> None:
    ours, theirs, again = [], [], []
    for number in range(_ROUNDS):
        with thinpool.Pool.create(place / f"pool-{number}") as pool:
            ours.append(seconds(lambda pool=pool: pool.images.load(layout)))
            again.append(seconds(lambda pool=pool: pool.images.load(layout)))
        command = ["umoci", "unpack", "--image", f"{layout}:x", place / f"b{number}"]
        theirs.append(seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True)))
        shutil.rmtree(place / f"b{number}")
    ratio = statistics.median(theirs) / statistics.median(ours)
    row("load of a Debian image", ratio, 2, "times as fast as umoci unpack", note=f"{statistics.median(ours):.2f} s")
    row("the same image again", 1000 * statistics.median(again), 500, "ms", at_most=True)


@pytest.fixture
def containerd(place: Path) -> Iterator[list[str | Path]]:
    """A containerd of our own; how to talk to it."""
    address = place / "containerd.sock"
    configuration = place / "containerd.toml"
    disabled = '["io.containerd.grpc.v1.cri"]'
    configuration.write_text(f'version = 2\nroot = "{place}/root"\nstate = "{place}/state"\ndisabled_plugins = {disabled}\n[grpc]\naddress = "{address}"\n')
    with (place / "containerd.log").open("wb") as log, subprocess.Popen(["containerd", "--config", configuration], stdout=log, stderr=log) as process:
        try:
            ctr: list[str | Path] = ["ctr", "--address", address]
            deadline = time.monotonic() + 30
            while subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode != 0:
                assert process.poll() is None and time.monotonic() < deadline, (place / "containerd.log").read_text()
                time.sleep(0.1)
            yield ctr
        finally:
            process.terminate()


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def test_against_containerd(layout: Path, place: Path, row: Row, containerd: list[str | Path]) -> None:
    archive = place / "image.tar"
    run("skopeo", "copy", f"oci:{layout}:x", f"oci-archive:{archive}:docker.io/library/debian:x")
    loads, imports, runs, calls, starts = [], [], [], [], []
    for number in range(_ROUNDS):
        with thinpool.Pool.create(place / f"pool-{number}") as pool:
            loads.append(seconds(lambda pool=pool: pool.images.load(archive, "debian:x")))
        # Each time in a namespace of its own, and with its content and snapshots gone, so that nothing is there.
        space = [*containerd, "--namespace", "bench"]
        imports.append(seconds(lambda space=space: run(*space, "images", "import", archive)))
        if number < _ROUNDS - 1:
            run(*space, "images", "rm", "--sync", "docker.io/library/debian:x")
    space = [*containerd, "--namespace", "bench"]
    command = [sys.executable, "-m", "thinpool.cli", "--pool", str(place / "pool-0")]
    with thinpool.connect(place / "pool-0", server=True) as pool:
        for number in range(10):
            runs.append(seconds(lambda: run(*command, "run", "--rm", "debian:x", "true")))
            calls.append(seconds(lambda: run_container(pool, "debian:x", ["true"], remove=True)))
            once = [*space, "run", "--rm", "docker.io/library/debian:x", f"c{number}", "true"]
            starts.append(seconds(lambda once=once: run(*once)))
        created = [seconds(lambda number=number: pool.containers.create("debian:x", name=f"new-{number}")) for number in range(20)]
        own = max(pool.containers.get(f"new-{number}").usage.exclusive for number in range(20))
    run(*space, "images", "rm", "--sync", "docker.io/library/debian:x")
    load, imported, ours, called, theirs = (statistics.median(one) for one in (loads, imports, runs, calls, starts))
    row("load of an archive", imported / load, 1, "times as fast as containerd's import to overlayfs", note=f"{load:.2f} s, durable")
    for what, taken in (("run_container()", called), ("thinpool run --rm", ours)):
        note = f"{1000 * taken:.0f} ms, {1000 * theirs:.0f} ms"
        row(f"from the image to the end of true, {what}", theirs / taken, 1, "times as fast as ctr run --rm", note=note)
    row("another container of an image", 1000 * statistics.median(created), 10, "ms", at_most=True, note=f"{own >> 10} KiB")


@pytest.mark.parametrize(
    ("policy", "large", "directories"),
    [("packed", 0, False), ("from 64 KiB", 16, False), ("from 32 KiB", 8, False), ("from 16 KiB", 4, False), ("from 32 KiB, directories", 8, True)],
)
def test_equal_trees_share(debian: Path, place: Path, row: Row, policy: str, large: int, directories: bool) -> None:
    """The tree at / of one image, and below /srv of another that has something else before it."""
    moved = place / "moved.tar"
    with tarfile.open(debian) as old, tarfile.open(moved, "w") as new:
        for number in range(101):
            info = tarfile.TarInfo(f"other/{number}")
            info.size = 1000 + 997 * number
            new.addfile(info, io.BytesIO(b"\1" * info.size))
        for info in old:
            info.name = f"srv/debian/{info.name}"
            if info.islnk():
                info.linkname = f"srv/debian/{info.linkname}"
            new.addfile(info, old.extractfile(info) if info.isreg() else None)
    with thinpool.Pool.create(place / "pool") as pool:
        blank = blank_layer(pool, "ext4", 10 << 30)
        taken = []
        for name, path in (("first", debian), ("second", moved)):
            layer = blank.clone(name)
            with path.open("rb") as tar, Ext4(layer, writable=True, align_large=large, align_directories=directories) as filesystem:
                apply_layer(tar, Ext4Tree(filesystem), whiteouts=True)
            shared = share_equal_chunks(pool, layer, blank)
            taken.append((layer.usage().mapped, shared))
        mapped, shared = taken[1]
        case, note = f"shared by an equal tree elsewhere, large files aligned: {policy}", f"{taken[0][0] >> 20} MiB of chunks"
        row(case, shared / mapped, 0.5, "of its chunks", note=note)


@pytest.mark.parametrize("cluster_kib", [4, 16, 64])
def test_equal_trees_share_with_bigalloc(debian: Path, place: Path, row: Row, cluster_kib: int) -> None:
    """The same with file systems that mke2fs fills, by the size of its allocation clusters."""
    (place / "first").mkdir()
    (place / "second/srv/debian").mkdir(parents=True)
    for number in range(101):
        (place / f"second/other-{number}").write_bytes(b"\1" * (1000 + 997 * number))
    options = ["-b", "4096", "-U", "12345678-1234-1234-1234-123456789012", "-E", "hash_seed=12345678-1234-1234-1234-123456789012"]
    if cluster_kib > 4:
        options += ["-O", "bigalloc", "-C", str(cluster_kib << 10)]
    with thinpool.Pool.create(place / "pool") as pool:
        taken = [0]
        for name, below in (("first", ""), ("second", "srv/debian")):
            run("tar", "-C", place / name / below, "-xf", debian)
            run("truncate", "-s", "10G", place / f"{name}.img")
            run("mke2fs", "-q", "-t", "ext4", *options, "-d", place / name, place / f"{name}.img")
            pool.import_raw(place / f"{name}.img", name)
            taken.append(pool.usage().allocated)
        shared = 1 - (taken[2] - taken[1]) / pool.layer("second").usage().mapped
    row(f"shared by an equal tree elsewhere, mke2fs, clusters of {cluster_kib} KiB", shared, 0.5, "of its chunks", note=f"{taken[1] >> 20} MiB of chunks")
