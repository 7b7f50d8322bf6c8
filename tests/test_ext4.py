"""The file system library: what it makes is what the kernel and e2fsck know, and the same each time."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_root
from filetrees import described

import thinpool
from thinpool.filesystems.blank import blank_layer
from thinpool.filesystems.ext4 import Attributes, Ext4

SIZE = 256 << 20


def attributes(kind: int, rng: random.Random, mode: int = 0o644) -> Attributes:
    device = os.makedev(rng.choice([1, 300]), rng.choice([3, 70_000])) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    times = [0, -5, 1_700_000_000_123_456_789, 4_000_000_000_000_000_001, 2_208_988_800_000_000_000]
    return Attributes(kind | mode, rng.choice([0, 1000, 100_000]), rng.choice([0, 70_000]), rng.choice(times), rdev=device)


def fsck(layer: thinpool.Layer, directory: Path) -> None:
    image = directory / "fsck.img"
    layer.export_raw(image)
    done = subprocess.run(["/sbin/e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    image.unlink()
    assert done.returncode == 0, done.stdout + done.stderr


class Model:
    """The same operations on the file system and on dictionaries."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.directories: dict[int, dict[bytes, int]] = {2: {}}
        self.content: dict[int, bytearray] = {}
        self.kinds: dict[int, int] = {}
        self.xattrs: dict[int, dict[str, bytes]] = {}

    def name(self) -> bytes:
        return bytes(self.rng.choices(b"abcdefgh.-\xc3\xbc", k=self.rng.choice([1, 3, 20, 255])))

    def step(self, fs: Ext4) -> None:
        rng = self.rng
        directory = rng.choice(list(self.directories))
        names = self.directories[directory]
        name = self.name() if rng.random() < 0.6 or not names else rng.choice(list(names))
        if name in (b".", b"..") or (directory == 2 and name == b"lost+found"):
            return
        if name not in names:
            self.make(fs, directory, name)
        elif rng.random() < 0.5:
            self.unlink(fs, directory, name)
        else:
            self.change(fs, names[name])

    def make(self, fs: Ext4, directory: int, name: bytes) -> None:
        rng = self.rng
        kind = rng.choice([stat.S_IFREG] * 6 + [stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
        target = b"t" * rng.choice([1, 59, 60, 4000]) if kind == stat.S_IFLNK else b""
        xattrs = {f"user.k{n}": rng.randbytes(rng.choice([0, 5, 300])) for n in range(rng.choice([0, 0, 1, 3]))} if kind in (stat.S_IFREG, stat.S_IFDIR) else {}
        if self.content and rng.random() < 0.1:
            inode = rng.choice(list(self.content))
            fs.link(directory, name, inode)
        else:
            inode = fs.make(directory, name, attributes(kind, rng), target=target, xattrs=xattrs)
            self.kinds[inode], self.xattrs[inode] = kind, xattrs
            if kind == stat.S_IFDIR:
                self.directories[inode] = {}
            elif kind == stat.S_IFREG:
                self.content[inode] = bytearray()
                self.fill(fs, inode)
        self.directories[directory][name] = inode

    def fill(self, fs: Ext4, inode: int) -> None:
        position, data = 0, self.content[inode]
        for _ in range(self.rng.choice([0, 1, 1, 3])):
            position += self.rng.choice([0, 0, 5, 4096, 100_000])
            piece = self.rng.randbytes(self.rng.choice([1, 4096, 5000, 200_000]))
            fs.write(inode, piece, position, size=len(piece))
            data.extend(bytes(max(0, position - len(data))))
            data[position : position + len(piece)] = piece
            position += len(piece)

    def change(self, fs: Ext4, inode: int) -> None:
        if inode not in self.content:
            return
        data = self.content[inode]
        if self.rng.random() < 0.4:
            size = self.rng.choice([0, len(data) // 2, len(data) + 5000])
            fs.truncate(inode, size)
            del data[size:]
            data.extend(bytes(size - len(data)))
        else:
            position, piece = self.rng.randrange(len(data) + 10_000), self.rng.randbytes(self.rng.choice([1, 4096, 9000]))
            fs.write(inode, piece, position)
            data.extend(bytes(max(0, position + len(piece) - len(data))))
            data[position : position + len(piece)] = piece

    def unlink(self, fs: Ext4, directory: int, name: bytes) -> None:
        inode = self.directories[directory][name]
        if self.directories.get(inode):
            with pytest.raises(OSError, match="not empty"):
                fs.unlink(directory, name)
            return
        fs.unlink(directory, name)
        del self.directories[directory][name]
        if not any(inode in names.values() for names in self.directories.values()):
            for table in (self.directories, self.content, self.kinds, self.xattrs):
                table.pop(inode, None)  # type: ignore[attr-defined]

    def check(self, fs: Ext4) -> None:
        for directory, names in self.directories.items():
            found = {name: inode for name, inode, _ in fs.entries(directory) if name != b"lost+found" or directory != 2}
            assert found == names
        for inode, data in self.content.items():
            assert fs.attributes(inode).size == len(data)
            assert fs.read(inode, len(data) + 1, 0) == bytes(data)
            assert fs.attributes(inode).links == sum(list(names.values()).count(inode) for names in self.directories.values())
        for inode, xattrs in self.xattrs.items():
            assert fs.xattrs(inode) == xattrs


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_leave_a_clean_file_system(pool: thinpool.Pool, tmp_path: Path, seed: int) -> None:
    layer, model = blank_layer(pool, "ext4", SIZE).clone("l"), Model(seed)
    for _ in range(3):  # opened anew each time, as for a layer on a layer
        with Ext4(layer, writable=True) as fs:
            for _ in range(120):
                model.step(fs)
            model.check(fs)
        fsck(layer, tmp_path)
        with Ext4(layer) as fs:
            model.check(fs)


def test_the_same_operations_give_the_same_bytes(tmp_path: Path) -> None:
    images = []
    for number in range(2):
        with thinpool.Pool.create(tmp_path / str(number)) as pool:
            layer, model = blank_layer(pool, "ext4", SIZE).clone("l"), Model(7)
            with Ext4(layer, writable=True) as fs:
                for _ in range(150):
                    model.step(fs)
            layer.export_raw(tmp_path / f"{number}.img")
            images.append((tmp_path / f"{number}.img").read_bytes())
    assert images[0] == images[1]


def test_large_directories_and_files(pool: thinpool.Pool, tmp_path: Path) -> None:
    layer, rng = blank_layer(pool, "ext4", 1 << 30).clone("l"), random.Random(1)
    with Ext4(layer, writable=True) as fs:
        many = fs.make(2, b"many", attributes(stat.S_IFDIR, rng, 0o755))
        for number in range(10_000):
            fs.make(many, b"file-%d" % number, Attributes(stat.S_IFREG | 0o644, 0, 0, 0))
        for number in range(0, 10_000, 3):
            fs.unlink(many, b"file-%d" % number)
        big = fs.make(2, b"big", Attributes(stat.S_IFREG | 0o644, 0, 0, 0))
        for number in range(1000):  # holes between: as many extents
            fs.write(big, b"x" * 4096, number * 8192, size=1000 * 8192)
        huge = fs.make(2, b"huge", Attributes(stat.S_IFREG | 0o644, 0, 0, 0))
        piece = rng.randbytes(1 << 20)
        for number in range(200):
            fs.write(huge, piece, number << 20, size=200 << 20)
        assert len(fs.extents(big)) == 1000
    with Ext4(layer) as fs:
        assert len(fs.entries(many)) == 10_000 - 3334
        assert fs.read(big, 8192, 8192 * 500) == b"x" * 4096 + bytes(4096)
        assert fs.read(huge, 1 << 20, 150 << 20) == piece
    fsck(layer, tmp_path)


def test_a_full_file_system_says_so_and_stays_clean(pool: thinpool.Pool, tmp_path: Path) -> None:
    layer = blank_layer(pool, "ext4", 16 << 20).clone("l")
    with Ext4(layer, writable=True) as fs:
        with pytest.raises(thinpool.OutOfSpace, match="larger size"):
            for number in range(100):
                inode = fs.make(2, b"f%d" % number, Attributes(stat.S_IFREG | 0o644, 0, 0, 0))
                fs.write(inode, os.urandom(1 << 20), 0, size=1 << 20)
    fsck(layer, tmp_path)


@needs_root()
def test_the_kernel_sees_it_and_the_other_way_round(pool: thinpool.Pool, tmp_path: Path) -> None:
    layer, rng = blank_layer(pool, "ext4", SIZE).clone("l"), random.Random(3)
    acl = bytes.fromhex("0200000001000600ffffffff020004000a00000004000400ffffffff10000400ffffffff20000000ffffffff")
    given: dict[str, tuple[int, Attributes, dict[str, bytes]]] = {}
    with Ext4(layer, writable=True) as fs:
        for number in range(40):
            kind = rng.choice([stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
            made = attributes(kind, rng, rng.choice([0o644, 0o4755, 0o1777]))
            xattrs = {"security.capability": bytes.fromhex("0100000200040000000000000000000000000000")} if kind == stat.S_IFREG else {}
            if number == 0:
                xattrs, made = {"system.posix_acl_access": acl}, Attributes(stat.S_IFREG | 0o640, 0, 0, 5)
            given[f"n{number}"] = fs.make(2, b"n%d" % number, made, xattrs=xattrs), made, xattrs
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    layer.mount(mountpoint)
    try:
        for name, (_, made, xattrs) in given.items():
            found = os.lstat(mountpoint / name)
            assert (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev) == (made.mode, made.uid, made.gid, made.mtime_ns, made.rdev)
            assert {key: os.getxattr(mountpoint / name, key) for key in os.listxattr(mountpoint / name)} == xattrs
        for number in range(300):  # the kernel makes an index of it
            (mountpoint / f"name-{number:0100}").write_bytes(b"x" * number)
        (mountpoint / "sub").mkdir()
        os.posix_fallocate(fd := os.open(mountpoint / "reserved", os.O_CREAT | os.O_WRONLY), 0, 100_000)
        os.close(fd)
        before: dict[str, Any] = described(mountpoint, without=["lost+found"])
    finally:
        layer.unmount()
    with Ext4(layer, writable=True) as fs:
        for name, inode, kind in fs.entries(2):
            entry = before.get(name.decode())
            if entry is not None and kind == stat.S_IFREG:
                assert (fs.attributes(inode).size, fs.attributes(inode).mtime_ns) == (entry["content"][0], entry["mtime"])
        reserved = fs.lookup(2, b"reserved")
        assert reserved is not None and fs.read(reserved[0], 200_000, 0) == bytes(100_000)
        fs.unlink(2, b"name-" + b"%0100d" % 7)
        fs.make(2, b"one-more", Attributes(stat.S_IFREG | 0o644, 0, 0, 0))
    fsck(layer, tmp_path)


@needs_root()
def test_a_file_system_in_use_is_refused(pool: thinpool.Pool, tmp_path: Path) -> None:
    layer = blank_layer(pool, "ext4", SIZE).clone("l")
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    layer.mount(mountpoint)
    try:
        (mountpoint / "f").write_text("x")
        os.sync()
        with pytest.raises(thinpool.LayerState, match="not unmounted cleanly"):
            Ext4(layer, writable=True)
    finally:
        layer.unmount()
    with pytest.raises(thinpool.LayerState, match="no ext4"):
        Ext4(pool.create_layer("empty", "16M"))


def test_a_killed_mkfs_leaves_nothing_for_long(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    thinpool.Pool.create(path).close()
    killed = f"""
        import os, signal
        import thinpool
        from thinpool.filesystems import blank
        blank.run_tool = lambda command: os.kill(os.getpid(), signal.SIGKILL)
        blank.blank_layer(thinpool.Pool.open({str(path)!r}), "ext4", 64 << 20)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(killed)], check=False).returncode == -signal.SIGKILL
    assert len(list(path.glob(".mkfs-*/image"))) == 1
    with thinpool.Pool.open(path) as pool:
        assert not list(path.glob(".mkfs-*"))
        fsck(blank_layer(pool, "ext4", 64 << 20), tmp_path)
