"""What a container changed: found path by path from the blocks that differ, and nothing but what may have changed is looked at."""

from __future__ import annotations

import io
import os
import random
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool
from filetrees import described, umoci_unpack

import thinpool
from thinpool.errors import ThinpoolError
from thinpool.filesystems.apply import apply_layer
from thinpool.filesystems.blank import blank_layer, grow_ext4
from thinpool.filesystems.changes import PathChange, changes
from thinpool.filesystems.ext4 import Ext4
from thinpool.filesystems.ext4tree import Ext4Tree
from thinpool.filesystems.layertar import write_layer

pytestmark = [needs_root(), needs_tool("umoci", "mkfs.ext4", "e2fsck", "resize2fs")]


class World:
    """A base with a tree in it, and a container on top that the kernel changes."""

    def __init__(self, directory: Path, pool: thinpool.Pool) -> None:
        self.pool, self.mountpoint = pool, directory / "mounted"
        self.mountpoint.mkdir()
        self.blank = blank_layer(pool, "ext4", 64 << 20)
        self.base = self.blank.clone("base")

    def begin(self) -> None:
        """What is in the base by now stays."""
        self.base.seal()
        self.container = self.base.clone("container")

    @contextmanager
    def mounted(self, layer: thinpool.Layer) -> Iterator[Path]:
        layer.mount(self.mountpoint)
        try:
            yield self.mountpoint
        finally:
            layer.unmount()

    def found(self, base: thinpool.Layer | None = None, layer: thinpool.Layer | None = None) -> list[PathChange]:
        base, layer = base or self.base, layer or self.container
        with Ext4(base) as below, Ext4(layer) as above:
            return changes(below, above, self.pool.diff(base, layer))

    def tar(self, base: thinpool.Layer | None = None, layer: thinpool.Layer | None = None) -> bytes:
        out = io.BytesIO()
        with Ext4(layer or self.container) as above:
            write_layer(out, self.found(base, layer), above)
        return out.getvalue()

    def told(self) -> list[str]:
        """As ``docker diff`` tells it: without the root."""
        return [f"{change.kind} {'/'.join(change.path)}" for change in self.found() if change.path]


@pytest.fixture
def world(tmp_path: Path, pool: thinpool.Pool) -> World:
    return World(tmp_path, pool)


def make_base(root: Path) -> None:
    for name in ("etc/deep/er", "var/log", "home", "gone/in"):
        (root / name).mkdir(parents=True)
    for name in ("etc/a", "etc/b", "etc/deep/er/x", "var/log/one", "home/large", "gone/in/y", "gone/z"):
        (root / name).write_bytes(name.encode() * (100_000 if "large" in name else 3))
    os.link(root / "etc/a", root / "etc/a2")
    os.link(root / "etc/a", root / "home/a3")
    os.symlink("etc/a", root / "link")
    os.setxattr(root / "etc/b", "user.color", b"blue")
    for path in root.rglob("*"):
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)


def rewrite_keeping_times(path: Path) -> None:
    before = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_equal(path: Path) -> None:
    """Another inode, with all the same in it."""
    before, content = path.stat(), path.read_bytes()
    new = path.with_name("new")
    new.write_bytes(content)
    for key in os.listxattr(path):
        os.setxattr(new, key, os.getxattr(path, key))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(path)
    os.utime(path.parent, ns=(10**18, 10**18))


def replace(path: Path, kind: str) -> None:
    subprocess.run(["rm", "-rf", path], check=True)
    if kind == "directory":
        path.mkdir()
        (path / "in").write_text("in")
    elif kind == "link":
        path.symlink_to("elsewhere")
    else:
        path.write_text("file")


def retarget(path: Path) -> None:
    """To a target just as long."""
    target = os.readlink(path)
    path.unlink()
    path.symlink_to(target[::-1])
    for one in (path, path.parent):
        os.utime(one, ns=(0, 10**18), follow_symlinks=False)


def read_everything(root: Path) -> None:
    subprocess.run(["mount", "-o", "remount,strictatime,nodiscard", root], check=True)
    for path in root.rglob("*"):
        path.read_bytes() if path.is_file() else None


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fspath(path))


MUTATIONS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda root: None, []),
    "read only": (read_everything, []),
    "a link to elsewhere, times kept": (lambda root: retarget(root / "link"), ["C link"]),
    "a file added": (lambda root: (root / "var/log/two").write_text("2"), ["C var", "C var/log", "A var/log/two"]),
    "a tree added": (lambda root: (root / "new/er").mkdir(parents=True), ["A new", "A new/er"]),
    "a file written": (lambda root: (root / "home/large").write_text("2"), ["C home", "C home/large"]),
    "written, times kept": (lambda root: rewrite_keeping_times(root / "home/large"), ["C home", "C home/large"]),
    "times only": (lambda root: os.utime(root / "etc/b", ns=(5, 7)), ["C etc", "C etc/b"]),
    "mode only": (lambda root: (root / "etc/b").chmod(0o4711), ["C etc", "C etc/b"]),
    "mode there and back": (lambda root: [(root / "etc/b").chmod(0o700), (root / "etc/b").chmod(0o644)], []),
    "owner of a link": (lambda root: os.lchown(root / "link", 1, 2), ["C link"]),
    "xattr": (lambda root: os.setxattr(root / "etc/b", "user.color", b"red"), ["C etc", "C etc/b"]),
    "large xattr": (lambda root: os.setxattr(root / "etc/b", "user.large", b"x" * 3000), ["C etc", "C etc/b"]),
    "attributes of a directory": (lambda root: (root / "etc/deep").chmod(0o700), ["C etc", "C etc/deep"]),
    "made and deleted again": (lambda root: [(root / "home/x").touch(), (root / "home/x").unlink()], ["C home"]),
    "a file deleted": (lambda root: (root / "etc/deep/er/x").unlink(), ["C etc", "C etc/deep", "C etc/deep/er", "D etc/deep/er/x"]),
    "a tree deleted": (lambda root: subprocess.run(["rm", "-rf", root / "gone"], check=True), ["D gone"]),
    "a file renamed": (lambda root: (root / "var/log/one").rename(root / "two"), ["A two", "C var", "C var/log", "D var/log/one"]),
    "a directory renamed": (
        lambda root: (root / "gone").rename(root / "home/g"),
        ["D gone", "C home", *(f"A home/{name}" for name in ("g", "g/in", "g/in/y", "g/z"))],
    ),
    "a file by a directory": (lambda root: replace(root / "etc/b", "directory"), ["C etc", "C etc/b", "A etc/b/in"]),
    "a directory by a file": (lambda root: replace(root / "gone", "file"), ["C gone"]),
    "a link by a file": (lambda root: replace(root / "link", "file"), ["C link"]),
    "a directory by a link": (lambda root: replace(root / "etc/deep", "link"), ["C etc", "C etc/deep"]),
    "made anew": (lambda root: replace(root / "gone", "directory"), ["C gone", "C gone/in", "D gone/z"]),
    "replaced by its equal": (lambda root: replace_by_equal(root / "etc/b"), []),
    "hard link added": (lambda root: os.link(root / "etc/b", root / "home/b2"), ["C etc", "C etc/b", "C home", "A home/b2"]),
    "hard link deleted": (lambda root: (root / "etc/a2").unlink(), ["C etc", "D etc/a2"]),
    "hard links written": (lambda root: (root / "etc/a").write_text("a"), ["C etc", "C etc/a", "C etc/a2", "C home", "C home/a3"]),
    "hard link broken": (lambda root: replace_by_equal(root / "etc/a2"), ["C etc", "C etc/a2"]),
    "special files": (
        lambda root: [os.mkfifo(root / "fifo"), make_socket(root / "sock"), os.mknod(root / "null", 0o20666, 259)],
        ["A fifo", "A null", "A sock"],
    ),
    "lost+found": (lambda root: (root / "lost+found").chmod(0o755), []),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_changes_are_told_as_docker_tells_them(world: World, what: str) -> None:
    mutate, expected = MUTATIONS[what]
    with world.mounted(world.base) as root:
        make_base(root)
    world.begin()
    with world.mounted(world.container) as root:
        mutate(root)
    assert world.told() == expected


def test_only_what_may_have_changed_is_looked_at(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.mounted(world.base) as root:
        for number in range(600):
            (root / f"d{number % 20}").mkdir(exist_ok=True)
            (root / f"d{number % 20}/f{number}").write_bytes(b"x" * 5000)
    world.begin()
    with world.mounted(world.container) as root:
        read_everything(root)
        (root / "d7/f7").chmod(0o600)
        (root / "d9/new").write_text("new")
        (root / "d9/passing").write_bytes(b"y" * 500_000)
        os.sync()
        (root / "d9/passing").unlink()
    looked_at: list[int] = []
    mapped: list[int] = []
    attributes, blocks = Ext4.attributes, Ext4.blocks
    monkeypatch.setattr(Ext4, "blocks", lambda self, inode: [mapped.append(inode), blocks(self, inode)][1])
    monkeypatch.setattr(Ext4, "attributes", lambda self, inode: [looked_at.append(inode), attributes(self, inode)][1])
    monkeypatch.setattr(Ext4, "read", lambda *_: pytest.fail("content was read"))
    assert world.told() == ["C d7", "C d7/f7", "C d9", "A d9/new"]
    assert len(set(looked_at)) <= 5 and len(set(mapped)) <= 5 + 10  # the two, their directories, and the root; and those of the file system itself


def test_content_that_changed_though_its_inode_did_not_is_found(world: World) -> None:
    with world.mounted(world.base) as root:
        for number in range(50):
            (root / f"f{number}").write_bytes(b"%02d" % number * 40_000)
    world.begin()
    with Ext4(world.container) as filesystem:
        found = filesystem.lookup(Ext4.ROOT, b"f17")
        assert found is not None
        offset, length = filesystem.blocks(found[0])[0]
    world.container.pwrite(b"x", offset + length - 5000)
    assert world.told() == ["C f17"]


def test_a_container_that_has_grown(world: World) -> None:
    with world.mounted(world.base) as root:
        make_base(root)
    world.begin()
    world.container.resize("256M")
    grow_ext4(world.container)
    with world.mounted(world.container) as root:
        (root / "home/filler").write_bytes(bytes(range(256)) * 400_000)
        for number in range(300):
            (root / f"etc/n{number}").write_text("n")
    assert world.told() == sorted(["C etc", "C home", "A home/filler", *(f"A etc/n{number}" for number in range(300))], key=lambda line: line[2:].split("/"))


def test_inode_tables_that_moved_when_it_grew(world: World, tmp_path: Path) -> None:
    """As where no room was kept for the descriptors of more groups."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 256 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-i", "1048576", "-O", "^resize_inode,^flex_bg", image], check=True)
    world.base = world.pool.import_raw(image, "no-room")
    with world.mounted(world.base) as root:
        make_base(root)
    world.begin()
    world.container.resize("40G")
    grow_ext4(world.container)
    with Ext4(world.base) as below, Ext4(world.container) as above:
        assert below.inode_tables()[0] != above.inode_tables()[0]
    with world.mounted(world.container) as root:
        (root / "etc/b").chmod(0o600)
        (root / "var/log/one").unlink()
        os.lchown(root / "link", 5, 5)
    assert world.told() == ["C etc", "C etc/b", "C link", "C var", "C var/log", "D var/log/one"]


def test_a_journal_that_needs_recovery_is_refused(world: World) -> None:
    world.begin()
    with world.mounted(world.container) as root:
        (root / "file").write_text("x")
        os.sync()
        world.container.snapshot("running")
    with pytest.raises(ThinpoolError, match="journal"):
        world.found(layer=world.pool.layer("running"))
    assert world.told() == ["A file"]


def random_change(choose: random.Random, root: Path) -> None:
    """One thing that a program may do to a tree."""
    paths = [path for path in root.rglob("*") if path.name != "lost+found"]
    directories = [root, *(path for path in paths if path.is_dir() and not path.is_symlink())]
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    new = choose.choice(directories) / choose.choice(["a", "b", "c", "d", "e", "n" * 120, "ü", os.fsdecode(b"\xff")])
    old = choose.choice(paths) if paths else None
    what = choose.choice(
        ["write"] * 2 + ["directory", "symlink", "link", "node", "remove", "rename", "overwrite", "attributes", "attributes", "xattr", "sparse"]
    )
    if what in ("write", "directory", "symlink", "link", "node", "sparse") and os.path.lexists(new):
        subprocess.run(["rm", "-rf", new], check=True)
        files = [path for path in files if os.path.lexists(path)]
    if what == "write":
        new.write_bytes(choose.randbytes(choose.choice([0, 10, 4096, 100_000])))
    elif what == "sparse":
        with open(new, "wb") as file:
            file.seek(choose.randrange(1 << 20))
            file.write(b"data")
            file.truncate(2 << 20)
    elif what == "directory":
        new.mkdir()
    elif what == "symlink":
        new.symlink_to(choose.choice(["a", "/etc/b", "t" * 200]))
    elif what == "link" and files:
        os.link(choose.choice(files), new)
    elif what == "node":
        os.mknod(new, choose.choice([stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK]) | 0o640, os.makedev(choose.randrange(4096), choose.randrange(1 << 20)))
    elif old is None or not os.path.lexists(old):
        return
    elif what == "remove":
        subprocess.run(["rm", "-rf", old], check=True)
    elif what == "rename" and old not in (new, *new.parents):
        subprocess.run(["rm", "-rf", new], check=True)
        if os.path.lexists(old):
            old.rename(new)
    elif what == "overwrite" and files:
        with open(choose.choice(files), "r+b") as file:
            file.seek(choose.randrange(5000))
            file.write(choose.randbytes(choose.randrange(1, 9000)))
    elif what == "attributes":
        os.lchown(old, choose.choice([0, 1000, 3_000_000_000]), choose.randrange(3))
        if not old.is_symlink():
            old.chmod(choose.choice([0o755, 0o600, 0o4755, 0o1777]))
        if choose.random() < 0.5:
            os.utime(old, ns=(0, choose.randrange(-(2**31), 2**32) * 10**9 + choose.choice([0, 1, 999_999_999])), follow_symlinks=False)
    elif what == "xattr" and not old.is_symlink():
        key = choose.choice(["trusted.a", "trusted.ü"])
        if key in os.listxattr(old) and choose.random() < 0.5:
            os.removexattr(old, key)
        else:
            os.setxattr(old, key, choose.randbytes(choose.choice([1, 20, 1000])))


@pytest.mark.parametrize("seed", range(8))
def test_the_changes_of_random_programs_applied_to_the_base_give_the_container(world: World, tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    with world.mounted(world.base) as root:
        for _ in range(60):
            random_change(choose, root)
    world.begin()
    with world.mounted(world.container) as root:
        for _ in range(choose.choice([3, 15, 60])):
            random_change(choose, root)
        expected = described(root, without=["lost+found"])
    tar = world.tar()
    copy = world.base.clone("copy")
    with Ext4(copy, writable=True) as filesystem:
        apply_layer(io.BytesIO(tar), Ext4Tree(filesystem), whiteouts=True)
    with world.mounted(copy) as root:
        assert described(root, without=["lost+found"]) == expected
    assert tar == world.tar()
    assert described(umoci_unpack(tmp_path / "umoci", [world.tar(world.blank, world.base), tar])) == expected
