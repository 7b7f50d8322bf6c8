"""Images: how fast they are taken in, and what equal trees in different images share, by where blocks are put.

A Debian root file system (debootstrap, minbase) is the tree; umoci unpacking the same image is the peer.
"""

from __future__ import annotations

import io
import shutil
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Row

import thinpool
from thinpool.filesystems.apply import apply_layer
from thinpool.filesystems.blank import blank_layer
from thinpool.filesystems.ext4 import Ext4
from thinpool.filesystems.ext4tree import Ext4Tree
from thinpool.sharing import share_equal_chunks

_ROUNDS = 3


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system as a tar."""
    directory = tmp_path_factory.mktemp("debian")
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", directory / "root"], check=True, capture_output=True)
    subprocess.run(["tar", "-C", directory / "root", "-cf", directory / "root.tar", "."], check=True)
    shutil.rmtree(directory / "root")
    return directory / "root.tar"


@pytest.fixture(scope="session")
def layout(debian: Path) -> Path:
    """The same as an OCI image of one layer."""
    path = debian.parent / "layout"
    for command in (["init", "--layout", path], ["new", "--image", f"{path}:x"], ["raw", "add-layer", "--image", f"{path}:x", debian]):
        subprocess.run(["umoci", *command], check=True, capture_output=True)
    return path


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
