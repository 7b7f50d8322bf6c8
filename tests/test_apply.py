"""Layer tars applied: the tree is the one that umoci unpacks, whiteouts hide what lies below and no more, nothing leads outside."""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from applied import InExt4, names, tree_of
from conftest import needs_root, needs_tool
from filetrees import Made, described, member, sparse, tar_of, umoci_unpack

import thinpool
from thinpool.errors import ImportFailed, OutOfSpace
from thinpool.filesystems.apply import apply_layer
from thinpool.filesystems.tree import MountedTree

pytestmark = [needs_root(), needs_tool("umoci", "mkfs.ext4", "e2fsck")]

DIR, LNK, SYM, CHR, BLK, FIFO = tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
CAPABILITY = b"\x01\x00\x00\x02\x00\x04\x00\x00" + bytes(11) + b"\xff"


ROOT = member("./", DIR, mtime=999)
EVERYTHING = [
    ROOT,
    member("bin/", DIR, mode=0o555, mtime=5),
    member("bin/su", content=b"#!" * 9000, mode=0o4755, uid=1000, gid=70000),
    member("bin/su2", LNK, linkname="bin/su", mode=0o4755, uid=1000, gid=70000),
    member("./bin/sh", SYM, linkname="/bin/../bin/su"),
    member("sbin", SYM, linkname="bin", uid=3),
    member("bin/symlink-twice", LNK, linkname="sbin"),
    member("ping", content=b"ping", pax={"SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape")}),
    member("var", DIR, mode=0o1777, pax={"SCHILY.xattr.user.color": "blue", "SCHILY.xattr.trusted.ü": "x=\ny"}),
    member("dev", DIR),
    member("dev/null", CHR, devmajor=1, devminor=3, mode=0o666),
    member("dev/disk", BLK, devmajor=259, devminor=70000, mode=0o660, gid=6),
    member("dev/pipe", FIFO, mode=0o622),
    member("empty"),
    member("block", content=bytes(range(256)) * 16),
    member("several", content=random.Random(1).randbytes(3_000_001)),
    member("d" * 200, DIR),
    member(f"{'d' * 200}/{'f' * 255}", content=b"long", pax={"mtime": "1234567890.123456789"}),
    member(f"{'d' * 200}/link", SYM, linkname="t" * 300),
    member("umläut-\udcff", content=b"odd"),
    member("old", content=b"1", pax={"mtime": "-1234.5"}),
    member("future", content=b"2", pax={"mtime": "4000000000.000000001"}),
]


def test_everything_is_as_umoci_unpacks_it(target: Any, tmp_path: Path) -> None:
    layer = tar_of(EVERYTHING)
    target.apply(layer)
    assert tree_of(target) == described(umoci_unpack(tmp_path / "umoci", [layer]))


BELOW = [
    ROOT,
    *(member(name, DIR, mtime=7) for name in ("etc", "etc/deep", "etc/deep/er", "opt", "opt/kept", "gone", "srv", "srv/in")),
    *(member(name, content=name.encode(), mtime=8) for name in ("etc/a", "etc/b", "etc/deep/er/x", "opt/1", "opt/2", "opt/kept/3", "gone/4", "srv/in/5")),
    member("file", content=b"file", pax={"SCHILY.xattr.user.old": "1", "SCHILY.xattr.user.both": "1"}),
    member("attributes", DIR, mode=0o700, pax={"SCHILY.xattr.user.old": "1", "SCHILY.xattr.user.both": "1"}),
    member("attributes/inside", content=b"stays"),
    member("to-link", content=b"linked from above"),
    member("link", SYM, linkname="etc"),
    member("tree", DIR),
    member("tree/of", DIR),
    member("tree/of/many", content=b"1"),
]
LAYERS: dict[str, list[Made]] = {
    "a file is hidden": [member("etc/.wh.a")],
    "a directory is hidden": [member(".wh.gone"), member("etc/.wh.deep")],
    "a link is hidden, not what it names": [member(".wh.link")],
    "hidden and brought again": [
        member("etc/.wh.a"),
        member("etc/a", content=b"new"),
        member(".wh.gone"),
        member("gone", DIR),
        member("gone/new", content=b"n"),
    ],
    "opaque": [member("opt", DIR, mode=0o710), member("opt/.wh..wh..opq"), member("opt/new", content=b"n")],
    "opaque after what is brought": [member("opt", DIR), member("opt/new", content=b"n"), member("opt/2", content=b"2 again"), member("opt/.wh..wh..opq")],
    "opaque directory kept within": [member("opt", DIR), member("opt/.wh..wh..opq"), member("opt/kept", DIR), member("opt/kept/new", content=b"n")],
    "directory by file": [member("etc", content=b"file now"), member("srv", SYM, linkname="opt")],
    "file by directory": [member("file", DIR, mode=0o711), member("file/in", content=b"in"), member("link", DIR), member("link/in", content=b"in")],
    "directory over directory": [member("attributes", DIR, mode=0o751, uid=4, pax={"SCHILY.xattr.user.new": "2", "SCHILY.xattr.user.both": "2"})],
    "file over file": [member("file", content=b"other", uid=9), member("etc/a", FIFO), member("etc/b", CHR, devmajor=1, devminor=5)],
    "hard links to below": [member("again", LNK, linkname="to-link"), member("etc/again", LNK, linkname="/to-link"), member("sym", LNK, linkname="link")],
    "hard link in place of a file": [member("etc/a", LNK, linkname="to-link"), member("tree", LNK, linkname="etc/b")],
    "hard link outlives its target": [member("again", LNK, linkname="to-link"), member(".wh.to-link")],
    "touched only": [member("etc/new", content=b"n"), member("tree/of/.wh.many"), member("srv/in/5", content=b"again")],
}


@pytest.mark.parametrize("what", LAYERS)
def test_layers_are_as_umoci_unpacks_them(target: Any, tmp_path: Path, what: str) -> None:
    layers = [tar_of(BELOW), tar_of([ROOT, *LAYERS[what]])]
    for layer in layers:
        target.apply(layer)
    assert tree_of(target) == described(umoci_unpack(tmp_path / "umoci", layers))


class Model:
    """Layers applied to a dictionary, which is all that a tree is: what a layer hides goes first, then come its members."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {"": {"mode": 0o40755, "owner": (0, 0), "mtime": 999 * 10**9, "xattrs": {}}}

    def is_directory(self, path: str) -> bool:
        return path in self.files and stat.S_ISDIR(self.files[path]["mode"])

    def remove_below(self, path: str) -> None:
        for other in [other for other in self.files if other.startswith(f"{path}/".lstrip("/")) and other]:
            del self.files[other]

    def remove(self, path: str) -> None:
        self.remove_below(path)
        self.files.pop(path, None)

    def add(self, made: Made) -> None:
        info, content = made
        kind = {DIR: stat.S_IFDIR, SYM: stat.S_IFLNK, CHR: stat.S_IFCHR, FIFO: stat.S_IFIFO}.get(info.type, stat.S_IFREG)
        entry: dict[str, Any] = {"mode": kind | (0o777 if info.type == SYM else info.mode), "owner": (info.uid, info.gid), "mtime": info.mtime * 10**9}
        entry["xattrs"] = {key.removeprefix("SCHILY.xattr."): value.encode() for key, value in info.pax_headers.items()}
        if info.type == LNK:
            entry = self.files[info.linkname]
        elif info.type == SYM:
            entry["target"] = info.linkname
        elif info.type == CHR:
            entry["device"] = (info.devmajor, info.devminor)
        elif info.type == tarfile.REGTYPE:
            entry["content"] = content
        for parent in ancestors(info.name):
            self.files.setdefault(parent, {"mode": 0o40755, "owner": (0, 0), "mtime": info.mtime * 10**9, "xattrs": {}})
        if info.type != DIR or not self.is_directory(info.name):
            self.remove(info.name)
        self.files[info.name] = entry

    def described(self) -> dict[str, dict[str, object]]:
        found = {}
        for path, entry in self.files.items():
            found[path] = {**entry, "mode": oct(entry["mode"])}
            if "content" in entry:
                found[path]["content"] = (len(entry["content"]), hashlib.sha256(entry["content"]).hexdigest())
            if not stat.S_ISDIR(entry["mode"]):
                found[path]["same as"] = sorted(other for other, its in self.files.items() if its is entry)
                found[path]["links"] = len(found[path]["same as"])
        return found


def ancestors(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def random_member(choose: random.Random, path: str, type: bytes, model: Model) -> Made:
    pax = {"SCHILY.xattr.user.n": str(choose.random())} if type in (tarfile.REGTYPE, DIR) and choose.random() < 0.3 else {}
    fields: dict[str, Any] = {"uid": choose.randrange(3), "mtime": choose.randrange(2**31), "mode": choose.choice([0o644, 0o755, 0o4711])}
    if type == CHR:
        fields |= {"devmajor": choose.randrange(300), "devminor": choose.randrange(1000)}
    elif type == SYM:
        fields["linkname"] = choose.choice(["a", "../b", "/c/d"])
    content = choose.randbytes(choose.choice([0, 3, 4096, 70_000])) if type == tarfile.REGTYPE else b""
    return member(path, type, content, pax, **fields)


def random_layer(choose: random.Random, model: Model) -> list[Made]:
    """A layer on top of what the model has; it is applied to the model, too."""
    hiding = choose.random() < 0.7
    marks, fixed, members = [], set(), []
    for path in choose.sample(sorted(model.files), min(len(model.files), choose.randrange(4))) if hiding else []:
        if not path or path not in model.files:
            continue
        opaque = model.is_directory(path) and choose.random() < 0.5
        parent, _, name = f"/{path}".rpartition("/")
        marks.append(f"{path}/.wh..wh..opq" if opaque else f"{parent}/.wh.{name}".lstrip("/"))
        fixed |= {*ancestors(path), *([path] if opaque else [])}
        (model.remove_below if opaque else model.remove)(path)
    for _ in range(choose.randrange(8)):
        path = "/".join(choose.choice("abc") for _ in range(choose.choice([1, 2, 2, 3])))
        if any(parent in model.files and not model.is_directory(parent) for parent in ancestors(path)):
            continue
        type = choose.choice([tarfile.REGTYPE, tarfile.REGTYPE, DIR, DIR, SYM, CHR, FIFO, LNK])
        if type != DIR and path in fixed:
            continue
        made = [random_member(choose, path, type, model)]
        if type == LNK:
            targets = [other for other, entry in model.files.items() if not stat.S_ISDIR(entry["mode"]) and other != path and not other.startswith(path + "/")]
            if not targets:
                continue
            made = [member(path, LNK, linkname=choose.choice(targets))]
        if hiding:
            made = [*(random_member(choose, parent, DIR, model) for parent in ancestors(path)), *made]
        for one in made:
            model.add(one)
        members += made
    for mark in marks:  # anywhere, but not between a member and the link to it
        members.insert(choose.randrange(len(members) + 1), member(mark))
    return members


@pytest.mark.parametrize("seed", range(6))
def test_random_stacks_are_what_a_plain_model_says(target: Any, seed: int) -> None:
    choose, model = random.Random(seed), Model()
    target.apply(tar_of([ROOT]))
    for _ in range(25):
        layer = random_layer(choose, model)
        target.apply(tar_of(layer))
    assert tree_of(target) == model.described()


BASE = [
    member("way", SYM, linkname=".."),
    member("absolute", SYM, linkname="/tmp"),
    member("file", content=b"x"),
    member("directory", DIR),
    member("directory/in", content=b"y"),
]
REFUSED: dict[str, list[Made]] = {
    "dot-dot": [member("../escaped")],
    "dot-dot inside": [member("directory/../../escaped")],
    "through a link": [member("way/escaped")],
    "through an absolute link": [member("absolute/escaped")],
    "through a link of its own": [member("own", SYM, linkname="directory"), member("own/escaped")],
    "directory through a link": [member("way/escaped/deep/er", DIR)],
    "through a file": [member("file/escaped")],
    "through a fifo of its own": [member("own", FIFO), member("own/escaped")],
    "whiteout of dot-dot": [member(".wh...")],
    "whiteout of dot-dot below": [member("directory/.wh...")],
    "whiteout of itself": [member("directory/.wh..")],
    "whiteout of nothing": [member("directory/.wh.")],
    "whiteout through a link": [member("absolute/.wh.escaped")],
    "whiteout through dot-dot": [member("../.wh.escaped")],
    "opaque through a link": [member("way/.wh..wh..opq")],
    "hard link outside": [member("own", LNK, linkname="../escaped")],
    "hard link through a link": [member("own", LNK, linkname="way/escaped")],
    "hard link to a directory": [member("own", LNK, linkname="directory")],
    "hard link to the root": [member("own", LNK, linkname="/")],
    "hard link to nothing": [member("own", LNK, linkname="not/there")],
    "hard link to what it replaces": [member("directory", LNK, linkname="directory/in")],
    "hard link to what was hidden": [member(".wh.file"), member("own", LNK, linkname="file")],
    "root replaced": [member("./", SYM, linkname="..")],
    "root a hard link": [member("./", LNK, linkname="file")],
    "name with NUL": [member("x", pax={"path": "a\0b"})],
    "link target with NUL": [member("own", SYM, pax={"linkpath": "a\0b"})],
    "link to nothing": [member("own", SYM)],
    "name too long": [member("n" * 256)],
    "time is no number": [member("own", pax={"mtime": "nan"})],
    "time out of range": [member("own", pax={"mtime": "1" + "0" * 19})],
    "time with an exponent": [member("own", pax={"mtime": "1e9"})],
    "owner is no number": [member("own", pax={"uid": "root"})],
    "owner out of range": [member("own", pax={"gid": "4294967295"})],
    "device out of range": [member("own", CHR, devmajor=4096, devminor=0)],
    "size is no number": [member("own", content=b"x", pax={"size": "-1"})],
    "sparse file of negative size": [sparse("own", "0\n", realsize=-1)],
    "sparse file with data behind its end": [sparse("own", "1\n4096\n512\n", b"x" * 512, realsize=4096)],
    "sparse file with data before its start": [sparse("own", "1\n-512\n512\n", b"x" * 512)],
    "sparse file with data twice": [sparse("own", "2\n512\n512\n0\n512\n", b"x" * 1024)],
    "sparse file with more data than there is": [sparse("own", "1\n0\n4096\n"), member("second", content=b"x" * 9000)],
    "sparse file with a map that does not end": [sparse("own", "9\n0\n4096\n")],
    "type not known": [member("own", b"?")],
    "xattr without a name": [member("own", pax={"SCHILY.xattr.": "x"})],
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(target: Any, what: str) -> None:
    target.apply(tar_of([ROOT, *BASE]))
    outside = sorted(os.listdir(target.directory.parent))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImportFailed) as refused:
        target.apply(tar_of(REFUSED[what]))
    info = REFUSED[what][-1][0]
    assert info.pax_headers.get("path", info.pax_headers.get("GNU.sparse.name", info.name))[:1] in str(refused.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert sorted(os.listdir(target.directory.parent)) == outside
    kept = {"", *(info.name for info, _ in BASE)} - ({"file"} if what.endswith("hidden") and not target.abandons else set())
    assert names(target) - {"own"} == kept


def test_missing_directories_get_the_time_of_what_they_are_made_for_and_others_keep_theirs(target: Any) -> None:
    target.apply(tar_of([ROOT, member("old", DIR, mtime=77, uid=5)]))
    target.apply(tar_of([member("old/new/er/file", mtime=1234, uid=9), member("/old/.wh.absent"), member("not/there/.wh.file"), member("no/.wh..wh..opq")]))
    found = tree_of(target)
    assert found["old"]["mtime"] == 77 * 10**9 and found["old"]["owner"] == (5, 0)
    assert [found[path] for path in ("old/new", "old/new/er")] == [{"mode": "0o40755", "owner": (0, 0), "mtime": 1234 * 10**9, "xattrs": {}}] * 2
    assert set(found) == {"", "old", "old/new", "old/new/er", "old/new/er/file"}


def test_members_take_the_place_of_members_of_the_same_layer(target: Any) -> None:
    layer = [member("a"), member("a", DIR), member("a/1"), member("a", SYM, linkname="b"), member("a", DIR), member("a/2"), member("a/2", LNK, linkname="a/2")]
    target.apply(tar_of([*layer, member(".wh.a"), member("b", DIR), member("b/1"), member("b"), member("b", DIR, uid=3), member("b/2")]))
    assert names(target) == {"", "a", "a/2", "b", "b/2"}


def test_bookkeeping_of_aufs_is_ignored(target: Any) -> None:
    target.apply(tar_of([member(".wh..wh.aufs"), member(".wh..wh.plnk", DIR), member(".wh..wh.plnk/76.2345", content=b"x"), member("etc/.wh..wh.orph", DIR)]))
    assert names(target) == {""}


def test_outside_of_layers_whiteouts_are_ordinary_names(target: Any) -> None:
    target.apply(tar_of([member("a"), member("d", DIR), member("d/in")]))
    target.apply(tar_of([member(".wh.a"), member("d/.wh..wh..opq"), member(".wh..wh.aufs")]), whiteouts=False)
    assert names(target) == {"", "a", ".wh.a", "d", "d/in", "d/.wh..wh..opq", ".wh..wh.aufs"}
    with pytest.raises(ImportFailed, match="'d' would replace a directory that is not empty"):
        target.apply(tar_of([member("d")]), whiteouts=False)


@pytest.mark.parametrize("seconds", [-(10**12), -(2**31) - 1, 2**34, 10**12])
def test_times_that_the_file_system_cannot_hold_become_the_nearest(tmp_path: Path, seconds: int) -> None:
    """As the kernel does it."""
    layer = tar_of([member("file", pax={"mtime": f"{seconds}.5"}), member("d", DIR, pax={"mtime": f"{seconds}.5"})])
    with thinpool.Pool.create(tmp_path / "pool") as pool:
        trees = InExt4(pool, tmp_path / "mounted"), InExt4(pool, tmp_path / "kernel", "kernel")
        trees[0].apply(layer)
        trees[1].layer.mount(trees[1].directory)
        try:
            with MountedTree(trees[1].directory) as tree:
                apply_layer(io.BytesIO(layer), tree, whiteouts=True)
        finally:
            trees[1].layer.unmount()
        found, expected = (tree_of(tree) for tree in trees)
        assert [found[path]["mtime"] for path in ("file", "d")] == [expected[path]["mtime"] for path in ("file", "d")]


def test_no_room_is_told_with_the_member(target: Any) -> None:
    with pytest.raises(OutOfSpace, match="no room for large") if target.abandons else nullcontext():
        target.apply(tar_of([member("small", content=b"x"), member("large", content=bytes(range(256)) * (80 << 12))]))
