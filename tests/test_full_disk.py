"""Small file systems that are really full: writers that need space are told, nobody else notices, and all goes on when space comes back.

test_quota.py does the same where it is a quota that is used up.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import damage
import invariants
import pytest
from commandline import Command
from conftest import needs_root, needs_tool

from thinpool import Layer, OutOfSpace, Pool
from thinpool.trash import throw_away

MIB = 1 << 20
KEEP, BIG = 8 * MIB, 1 << 40


@dataclass
class SmallDisk:
    """A directory that may take so much and no more, and a file that takes what is left of it. ``owner``: of all files, where it is his quota."""

    path: Path
    owner: int = 0

    @property
    def filler(self) -> Path:
        return self.path / "filler"

    @property
    def reason(self) -> str:
        return "a quota on the host's disk is used up" if self.owner else "the host's disk is full"

    def create_pool(self) -> Pool:
        pool = Pool.create(self.path / "pool")
        for path in (pool.path, *pool.path.rglob("*")):
            os.chown(path, self.owner, -1)
        return pool

    def fill(self) -> None:
        """To the last block."""
        size = 16 * MIB
        with open(self.filler, "wb") as file:
            os.fchown(file.fileno(), self.owner, -1)
            end = 0
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), end, size)
                    end += size
                except OSError as error:
                    assert error.errno == (errno.EDQUOT if self.owner else errno.ENOSPC)
                    size //= 2
            os.fsync(file.fileno())

    def free(self) -> None:
        self.filler.unlink()


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def mounted(directory: Path, size: int, *mkfs: str, options: str = "loop") -> Iterator[Path]:
    """A file system of that size, and where it is mounted."""
    image, mountpoint = directory / "disk.img", directory / "disk"
    mountpoint.mkdir()
    with open(image, "wb") as file:
        file.truncate(size)
    run(*mkfs, image)
    run("mount", "-o", options, image, mountpoint)
    try:
        yield mountpoint
    finally:
        run("umount", mountpoint)
        image.unlink()


@pytest.fixture(params=["ext4", "xfs"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """XFS wants 300 MiB at least; of these, about 60 are left to the test."""
    if request.param == "ext4":
        with mounted(tmp_path, 64 * MIB, "mkfs.ext4", "-q", "-m", "0") as path:
            yield SmallDisk(path)
        return
    with mounted(tmp_path, 320 * MIB, "mkfs.xfs", "-q") as path:
        with open(path / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(path).f_bavail * os.statvfs(path).f_frsize - 60 * MIB)
        yield SmallDisk(path)


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
    with small_disk.create_pool() as pool:
        keep, drop, late = pool.create_layer("keep", KEEP), pool.create_layer("drop", BIG), pool.create_layer("late", BIG)
        keep.pwrite(b"k" * KEEP, 0)
        pool.commit()
        small_disk.fill()
        write_until_full(drop)
        small_disk.free()
        assert write_until_full(drop) > 8  # by itself
        small_disk.fill()
        with pytest.raises(OutOfSpace, match=rf"{small_disk.reason}.*layer late"):
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
    pool = small_disk.create_pool()
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


@needs_root()
@needs_tool("mkfs.ext4", "mkfs.xfs")
def test_the_trash_goes_before_a_writer_is_refused_and_full_is_told(small_disk: SmallDisk) -> None:
    kinds: list[str] = []
    with small_disk.create_pool() as pool:
        (old := pool.create_layer("old", BIG)).pwrite(os.urandom(24 * MIB), 0)
        throw_away(pool, old, 24)
        layer = pool.create_layer("new", BIG)
        pool.commit()
        assert write_until_full(layer) > 40
        assert "trash" not in " ".join(layer.name for layer in pool.layers())
        with pool.watch.telling(lambda event: kinds.append(event.kind) if event else None):
            pool.watch.look()
            assert kinds[-1] == "full"
            layer.discard(0, BIG)
            pool.reclaim()
            pool.watch.look()
            assert kinds[-1] == "normal"
        check(pool)


@needs_root()
@needs_tool("mkfs.ext4")
def test_a_disk_without_inodes(tmp_path: Path) -> None:
    """A pool that is there needs no new file; what does need one says so."""
    with mounted(tmp_path, 64 * MIB, "mkfs.ext4", "-q", "-m", "0", "-N", "32") as path:
        command = Command(path)
        command("init")
        with pytest.raises(OSError, match="No space left"):
            for number in range(10_000):  # mkfs makes a few more than it is asked for
                (path / f"file{number}").touch()
        with Pool.open(command.pool) as pool:
            layer = pool.create_layer("a", BIG)
            layer.pwrite(b"a" * 20 * MIB, 0)
            layer.snapshot("a@1")
            layer.pwrite(b"b" * MIB, 0)
            layer.delete()
            pool.reclaim()
            check(pool)
        command("create", "b", "1G")
        assert command("check").startswith("full check: no errors")
        for words in ("serve", "restore-metadata --make", "export a@1 image"):
            code, line = command.fails(*words.split())
            assert code == 5, (words, line)
        damage.drop_record(command.pool, random.Random(1), command.pool, "chunk-counts")
        assert command.fails("repair")[0] == 5
        for number in range(8):
            (path / f"file{number}").unlink()
        assert "repaired" in command("repair")


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
