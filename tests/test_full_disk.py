"""Small file systems that are really full: writers that need space are told, nobody else notices, and all goes on when space comes back."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import invariants
import pytest
from conftest import needs_root, needs_tool

from thinpool import Layer, OutOfSpace, Pool

MIB = 1 << 20
KEEP, BIG = 8 * MIB, 1 << 40


@dataclass
class SmallDisk:
    """A mounted file system, and a file that takes what is left of it."""

    path: Path

    @property
    def filler(self) -> Path:
        return self.path / "filler"

    def fill(self) -> None:
        """To the last block."""
        size = 16 * MIB
        with open(self.filler, "wb") as file:
            end = 0
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), end, size)
                    end += size
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    size //= 2
            os.fsync(file.fileno())

    def free(self) -> None:
        self.filler.unlink()


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@pytest.fixture(params=["ext4", "xfs"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """XFS wants 300 MiB at least; of these, about 60 are left to the test."""
    image, mountpoint = tmp_path / "disk.img", tmp_path / "disk"
    mountpoint.mkdir()
    with open(image, "wb") as file:
        file.truncate((64 if request.param == "ext4" else 320) * MIB)
    run(*(("mkfs.ext4", "-q", "-m", "0") if request.param == "ext4" else ("mkfs.xfs", "-q")), image)
    run("mount", "-o", "loop", image, mountpoint)
    try:
        if request.param == "xfs":
            with open(mountpoint / "ballast", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, os.statvfs(mountpoint).f_bavail * os.statvfs(mountpoint).f_frsize - 60 * MIB)
        yield SmallDisk(mountpoint)
    finally:
        run("umount", mountpoint)


def write_until_full(layer: Layer) -> int:
    """How many MiB there was room for."""
    for number in range(1024):
        try:
            layer.pwrite(os.urandom(MIB), number * MIB)
        except OutOfSpace as error:
            assert error.errno == errno.ENOSPC
            return number
    raise AssertionError("there is no end to it")


def check(pool: Pool) -> None:
    pool.commit()
    assert pool.usage().mode == "normal"
    invariants.check(pool._store.records, pool.chunk_size)


@needs_root()
@needs_tool("mkfs.ext4", "mkfs.xfs")
def test_a_full_disk_stops_nobody_but_who_needs_space(small_disk: SmallDisk) -> None:
    with Pool.create(small_disk.path / "pool") as pool:
        keep, drop, late = pool.create_layer("keep", KEEP), pool.create_layer("drop", BIG), pool.create_layer("late", BIG)
        keep.pwrite(b"k" * KEEP, 0)
        pool.commit()
        small_disk.fill()
        write_until_full(drop)
        small_disk.free()
        assert write_until_full(drop) > 8  # by itself
        small_disk.fill()
        with pytest.raises(OutOfSpace, match=r"host's disk is full.*layer late"):
            late.pwrite(os.urandom(32 * MIB), 0)

        assert keep.pread(KEEP, 0) == b"k" * KEEP
        keep.pwrite(b"n" * KEEP, 0)
        for number in range(40):  # commits that take metadata from the reserve
            keep.snapshot(f"keep@{number}")
            keep.discard(number * 65536, 65536)
            if number >= 3:
                pool.layer(f"keep@{number - 3}").delete()
            pool.commit()
        assert pool.layer("keep@39").pread(MIB, 7 * MIB) == b"n" * MIB
        check(pool)

        drop.delete()
        pool.reclaim()
        late.pwrite(b"l" * 4 * MIB, 0)
        check(pool)
    with Pool.open(small_disk.path / "pool") as pool:
        assert pool.layer("keep").pread(KEEP, 0) == bytes(40 * 65536) + b"n" * (KEEP - 40 * 65536)
        assert pool.layer("late").pread(4 * MIB, 0) == b"l" * 4 * MIB


@needs_root()
@needs_tool("mkfs.ext4", "mkfs.xfs")
def test_a_pool_opens_on_a_full_disk_and_frees_it(small_disk: SmallDisk) -> None:
    pool = Pool.create(small_disk.path / "pool")
    drop = pool.create_layer("drop", BIG)
    write_until_full(drop)
    pool.close()
    small_disk.fill()
    with Pool.open(small_disk.path / "pool") as pool:
        pool.layer("drop").snapshot("drop@1")
        pool.layer("drop").delete()
        pool.layer("drop@1").delete()
        pool.reclaim()
        assert pool.usage().host == 0
        pool.create_layer("new", BIG).pwrite(os.urandom(8 * MIB), 0)
        check(pool)


def test_a_raised_capacity_lets_writers_go_on(pool_path: Path) -> None:
    with Pool.create(pool_path, capacity="8M") as pool:
        layer = pool.create_layer("a", BIG)
        assert write_until_full(layer) == 8
        with pytest.raises(OutOfSpace, match="capacity is used up"):
            layer.pwrite(b"x", 9 * MIB)
        layer.pwrite(b"x" * MIB, 7 * MIB)
        pool.set_capacity("16M")
        layer.pwrite(b"x" * 8 * MIB, 8 * MIB)
        pool.set_capacity("4M")
        with pytest.raises(OutOfSpace):
            layer.pwrite(b"x", 20 * MIB)
        assert layer.pread(MIB, 7 * MIB) == b"x" * MIB
        layer.discard(0, 13 * MIB)
        layer.pwrite(b"x", 20 * MIB)
        check(pool)
