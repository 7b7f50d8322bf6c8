"""Layer tars: what they say, in the form that every tool reads, the same bytes each time."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool
from filetrees import described, umoci_unpack

import thinpool
from thinpool.errors import LayerState
from thinpool.filesystems.apply import apply_layer
from thinpool.filesystems.blank import blank_layer
from thinpool.filesystems.changes import PathChange, changes
from thinpool.filesystems.ext4 import Ext4
from thinpool.filesystems.layertar import write_layer
from thinpool.filesystems.tree import MountedTree

pytestmark = [needs_root(), needs_tool("mkfs.ext4", "tar", "umoci")]


class World:
    """A directory on an ext4, and what of it comes into a tar."""

    def __init__(self, pool: thinpool.Pool, mountpoint: Path) -> None:
        self.pool, self.mountpoint = pool, mountpoint
        self.blank = blank_layer(pool, "ext4", 64 << 20)
        self.layer = self.blank.clone("layer")
        mountpoint.mkdir()
        self.layer.mount(mountpoint)

    def tar(self, *, of: list[PathChange] | None = None) -> bytes:
        if self.pool.attachments():
            self.layer.unmount()
        out = io.BytesIO()
        with Ext4(self.blank) as below, Ext4(self.layer) as above:
            write_layer(out, changes(below, above, self.pool.diff(self.blank, self.layer)) if of is None else of, above)
        return out.getvalue()


@pytest.fixture
def world(pool: thinpool.Pool, tmp_path: Path) -> World:
    return World(pool, tmp_path / "mounted")


def members(tar: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [member for member in opened.getmembers() if member.name != "."]


def test_directories_come_first_and_links_after_their_file(world: World) -> None:
    for name in ("b/a", "b-", "b/z", "a/b"):
        (world.mountpoint / name).parent.mkdir(exist_ok=True)
        (world.mountpoint / name).write_text(name)
    os.link(world.mountpoint / "b/a", world.mountpoint / "0")
    os.link(world.mountpoint / "b/a", world.mountpoint / "c")
    os.symlink("x" * 300, world.mountpoint / "s")
    os.link(world.mountpoint / "s", world.mountpoint / "s2", follow_symlinks=False)
    tar = world.tar()
    assert [member.name for member in members(tar)] == ["0", "a", "a/b", "b", "b/a", "b/z", "b-", "c", "s", "s2"]
    assert {member.name: member.linkname for member in members(tar) if member.islnk()} == {"b/a": "0", "c": "0", "s2": "s"}
    assert tar == world.tar() and len(tar) % 512 == 0 and tar.endswith(bytes(1024))


def test_headers_are_plain_where_plain_ones_are_wide_enough(world: World) -> None:
    root = world.mountpoint
    (root / ("n" * 100)).write_bytes(b"x" * 1000)
    os.chown(root / ("n" * 100), 0o7777777, 5)
    for name, mtime_ns in (("n" * 100, 8**11 * 10**9 - 10**9), ("long" * 26, 0), ("fraction", 1_500_000_001), ("past", -1_500_000_000), ("ü", 0)):
        (root / name).touch()
        os.utime(root / name, ns=(0, mtime_ns))
    os.utime(root, ns=(0, 0))
    (root / "device").touch()
    os.chown(root / "device", 0o10000000, 0)
    os.utime(root / "device", ns=(0, 0))
    os.utime(root, ns=(0, 0))
    found = {member.name: member.pax_headers for member in members(world.tar())}
    assert found == {
        "device": {"uid": str(0o10000000)},
        "fraction": {"mtime": "1.500000001"},
        "long" * 26: {"path": "long" * 26},
        "n" * 100: {},
        "past": {"mtime": "-1.500000000"},
        "ü": {"path": "ü"},
    }


def test_whiteouts_sockets_and_replaced_types(world: World) -> None:
    (world.mountpoint / "d").mkdir()
    for name in ("new", "was-a-file"):
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.fspath(world.mountpoint / name))
    tar = world.tar()
    assert [member.name for member in members(tar)] == ["d"]
    with Ext4(world.layer) as layer:
        inodes = {name: layer.lookup(Ext4.ROOT, name.encode()) for name in ("d", "new", "was-a-file")}
    told = [
        PathChange(("d",), "C", inodes["d"][0]),  # type: ignore[index]
        PathChange(("d", "gone"), "D"),
        PathChange(("new",), "A", inodes["new"][0]),  # type: ignore[index]
        PathChange(("was-a-file",), "C", inodes["was-a-file"][0]),  # type: ignore[index]
    ]
    assert world.tar(of=told) == world.tar(of=told[::-1])
    assert [(member.name, member.type, member.size) for member in members(world.tar(of=told))] == [
        ("d", tarfile.DIRTYPE, 0),
        ("d/.wh.gone", tarfile.REGTYPE, 0),
        (".wh.was-a-file", tarfile.REGTYPE, 0),
    ]


def test_a_name_that_would_be_a_whiteout_is_refused(world: World) -> None:
    (world.mountpoint / "d").mkdir()
    (world.mountpoint / "d/.wh.mine").touch()
    with pytest.raises(LayerState, match=r"/d/\.wh\.mine .* Rename or remove it"):
        world.tar()


def test_everything_comes_back(world: World, tmp_path: Path) -> None:
    """Also what PAX headers have no good words for: names of attributes with ``=``, empty values, names that are no UTF-8."""
    root = world.mountpoint
    (root / "file").write_bytes(os.urandom((3 << 20) + 5))
    os.chown(root / "file", 4_000_000_000, 70_000)
    (root / "file").chmod(0o6755)
    for key, value in {"user.a=b": b"=\n\0\xff", "user.empty": b"", "trusted.ü": b"x", "user.long": bytes(range(256)) * 4}.items():
        os.setxattr(root / "file", key, value)
    os.setxattr(root / "file", "security.capability", b"\x01\x00\x00\x02\x00\x04\x00\x00" + bytes(11) + b"\xff")
    (root / os.fsdecode(b"\xff\xfe")).write_text("x")
    os.utime(root / "file", ns=(0, -1_234_567_890_987_654_321))
    os.mknod(root / "device", 0o60640, os.makedev(4095, 0xFFFFF))
    os.mkfifo(root / "fifo")
    with open(root / "sparse", "wb") as sparse:
        sparse.truncate(9 << 20)
        sparse.seek(4 << 20)
        sparse.write(b"x")
    expected = described(root, without=["lost+found"])
    (tmp_path / "tree").mkdir()
    with MountedTree(tmp_path / "tree") as tree:
        apply_layer(io.BytesIO(world.tar()), tree, whiteouts=True)
    assert described(tmp_path / "tree") == expected


def test_gnu_tar_and_umoci_read_it(world: World, tmp_path: Path) -> None:
    root = world.mountpoint
    (root / ("long/" * 60)).mkdir(parents=True)
    (root / ("long/" * 60) / ("f" * 255)).write_bytes(b"x" * 70_000)
    os.symlink("t" * 400, root / "link")
    os.setxattr(root / "long", "user.note", b"text")
    os.link(root / "link", root / "link2", follow_symlinks=False)
    expected = described(root, without=["lost+found"])
    tar = world.tar()
    (tmp_path / "tree").mkdir()
    subprocess.run(["tar", "-xp", "--xattrs", "--xattrs-include=*", "-C", tmp_path / "tree"], input=tar, check=True, timeout=60)
    assert described(tmp_path / "tree") == expected
    assert described(umoci_unpack(tmp_path / "umoci", [tar])) == expected
