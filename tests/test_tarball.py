"""Tarballs unpacked: everything they can say is kept, nothing leads outside, and damage is told as such."""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool

from thinpool.errors import ImportFailed
from thinpool.filesystems import tarball
from thinpool.filesystems.tree import MountedTree

pytestmark = [needs_root(), needs_tool("tar", "xz", "gzip", "bzip2")]


def unpack(path: Path, directory: Path) -> None:
    with MountedTree(directory) as tree:
        tarball.unpack(path, tree)


MTIME_NS = 1_234_567_890_123_456_789


def make_tree(root: Path) -> None:
    """One of everything."""
    (root / "deep" / ("d" * 120)).mkdir(parents=True)
    (root / "deep" / ("d" * 120) / ("f" * 150)).write_bytes(b"long names")
    (root / "empty").touch()
    (root / "large").write_bytes(random.Random(1).randbytes((1 << 20) + 77))
    (root / "set-id").write_bytes(b"#!")
    os.chown(root / "set-id", 1000, 2000)
    (root / "set-id").chmod(0o6755)
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    (root / "link").symlink_to("/etc/../outside")
    os.link(root / "large", root / "same")
    os.mkfifo(root / "fifo", 0o622)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    (Path(os.fsdecode(os.fsencode(root) + b"/not-\xff-utf8"))).write_bytes(b"x")
    with open(root / "sparse", "wb") as sparse:
        for offset in (1 << 20, 9 << 20, 33 << 20):
            sparse.seek(offset)
            sparse.write(b"data" * 1024)
        sparse.truncate(40 << 20)
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(MTIME_NS, MTIME_NS), follow_symlinks=False)


def described(root: Path, *, nanoseconds: bool) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        info = path.lstat()
        mtime = info.st_mtime_ns if nanoseconds else info.st_mtime_ns // 10**9
        content: object = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        target = os.readlink(path) if path.is_symlink() else None
        links = info.st_nlink if not path.is_dir() else 0
        found[str(path.relative_to(root))] = (info.st_mode, info.st_uid, info.st_gid, mtime, info.st_rdev, links, target, content)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    make_tree(made)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "target"
    made.mkdir()
    return made


FORMATS = {
    "gnu": ["--format=gnu"],
    "gnu-sparse": ["--format=gnu", "--sparse"],
    "pax": ["--format=pax"],
    "pax-0.0": ["--format=pax", "--sparse", "--sparse-version=0.0"],
    "pax-0.1": ["--format=pax", "--sparse", "--sparse-version=0.1"],
    "pax-1.0": ["--format=pax", "--sparse", "--sparse-version=1.0"],
}


@pytest.mark.parametrize("how", FORMATS)
def test_everything_is_kept(source: Path, target: Path, tmp_path: Path, how: str) -> None:
    archive = tmp_path / "a.tar"
    subprocess.run(["tar", "-C", source, *FORMATS[how], "-cf", archive, "."], check=True, timeout=60)
    unpack(archive, target)
    pax = how.startswith("pax")
    assert described(target, nanoseconds=pax) == described(source, nanoseconds=pax)
    assert (target / "same").stat().st_ino == (target / "large").stat().st_ino
    if "-" in how:
        assert (target / "sparse").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_packs(source: Path, target: Path, tmp_path: Path, format: int) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.add(source, ".")
    unpack(tmp_path / "a.tar", target)
    assert described(target, nanoseconds=False) == described(source, nanoseconds=False)


@pytest.mark.parametrize("option", ["-z", "-J", "-j", "--zstd"])
def test_compressed_and_cut(source: Path, target: Path, tmp_path: Path, option: str) -> None:
    if option == "--zstd":
        pytest.importorskip("zstandard")
    (source / "sparse").unlink()
    archive = tmp_path / "a.tar.x"
    subprocess.run(["tar", "-C", source, option, "--format=pax", "-cf", archive, "."], check=True, timeout=60)
    unpack(archive, target)
    assert described(target, nanoseconds=True) == described(source, nanoseconds=True)
    whole, choose = archive.read_bytes(), random.Random(2)
    for number in range(8):
        archive.write_bytes(whole[: choose.randrange(7, len(whole) * 9 // 10)])
        empty = tmp_path / f"cut{number}"
        empty.mkdir()
        with pytest.raises(ImportFailed):
            unpack(archive, empty)
        shutil.rmtree(empty)


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, type: bytes = tarfile.REGTYPE, linkname: str = "", **headers: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = type, linkname, headers
    return info


def test_extended_attributes(target: Path, tmp_path: Path) -> None:
    capability = b"\x01\x00\x00\x02\x00\x04\x00\x00" + bytes(12)
    info = member("ping")
    info.pax_headers = {
        "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.trusted.note": "text",
    }
    info.uid = 7
    unpack(packed(tmp_path / "a.tar", (info, b"x")), target)
    assert os.getxattr(target / "ping", "security.capability") == capability
    assert os.getxattr(target / "ping", "trusted.note") == b"text"


OUTSIDE = {
    "dot-dot": [(member("../escaped"), b"x")],
    "dot-dot inside": [(member("a/../../escaped"), b"x")],
    "through a link": [(member("way", tarfile.SYMTYPE, ".."), b""), (member("way/escaped"), b"x")],
    "through an absolute link": [(member("way", tarfile.SYMTYPE, "/tmp"), b""), (member("way/escaped"), b"x")],
    "hard link outside": [(member("a", tarfile.LNKTYPE, "../secret"), b"")],
    "hard link through a link": [(member("way", tarfile.SYMTYPE, ".."), b""), (member("a", tarfile.LNKTYPE, "way/secret"), b"")],
    "device on the way": [(member("way", tarfile.FIFOTYPE), b""), (member("way/a"), b"x")],
    "root replaced": [(member("./", tarfile.SYMTYPE, ".."), b"")],
    "full directory replaced": [(member("a/b"), b""), (member("a"), b"x")],
    "name with NUL": [(member("x", path="a\0b"), b"")],
    "time is no number": [(member("x", mtime="nan"), b"")],
    "time out of range": [(member("x", mtime="1e30"), b"")],
    "owner out of range": [(member("x", uid="99999999999999999999"), b"")],
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_refused(target: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "secret").write_text("secret")
    before = sorted(os.listdir(tmp_path))
    archive = packed(tmp_path / "a.tar", *OUTSIDE[what])
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImportFailed):
        unpack(archive, target)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "a.tar"])
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_absolute_names_are_below_the_root_and_later_members_win(target: Path, tmp_path: Path) -> None:
    members = [(member("/abs/file"), b"1"), (member("twice", tarfile.SYMTYPE, "/etc/hostname"), b""), (member("twice"), b"2"), (member("abs/file"), b"3")]
    unpack(packed(tmp_path / "a.tar", *members), target)
    assert (target / "abs/file").read_bytes() == b"3"
    assert not (target / "twice").is_symlink() and (target / "twice").read_bytes() == b"2"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cut_anywhere_or_damaged(tmp_path: Path, format: int) -> None:
    archive = packed(tmp_path / "a.tar", (member("n" * 200), b"a" * 3000), (member("second"), b"b" * 700), (member("third"), b"c"), format=format)
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        second = tar.getmember("second").offset
        last = tar.getmembers()[-1].offset_data + 512
    damaged = bytearray(whole)
    damaged[second + 5] ^= 1
    cases = [whole[:cut] for cut in range(0, last + 1, 512)] + [whole[:cut] for cut in range(100, last, 777)]
    cases += [bytes(damaged), b"no tar at all" * 1000, b"\x1f\x8b" + bytes(100), b"\xfd7zXZ\0" + b"junk" * 100]
    descriptors = len(os.listdir("/proc/self/fd"))
    for number, content in enumerate(cases):
        archive.write_bytes(content)
        directory = tmp_path / f"t{number}"
        directory.mkdir()
        with pytest.raises(ImportFailed):
            unpack(archive, directory)
    assert len(os.listdir("/proc/self/fd")) == descriptors
