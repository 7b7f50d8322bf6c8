"""Tars read strictly: what is damaged is never taken for an end or for something else, and each dialect is read as it is meant."""

from __future__ import annotations

import base64
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from applied import names, tree_of
from conftest import needs_root, needs_tool
from filetrees import member, sparse, tar_of

from thinpool.errors import ImportFailed
from thinpool.filesystems.apply import apply_layer
from thinpool.filesystems.tree import MountedTree

pytestmark = [needs_root(), needs_tool("mkfs.ext4", "e2fsck")]


def test_the_stream_is_read_to_its_end(target: Any) -> None:
    stream = io.BytesIO(tar_of([member("a")]) + bytes(5 << 20))
    with MountedTree(target.directory) as tree:
        apply_layer(stream, tree, whiteouts=True)
    assert stream.tell() == len(stream.getvalue())


def oversized(name: str, type: bytes, size: int) -> bytes:
    """A header that says, in base 256, so many bytes."""
    header = bytearray(member(name, type)[0].tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    return bytes(header)


@pytest.mark.parametrize("type", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.DIRTYPE])
def test_sizes_below_zero_are_damage(target: Any, type: bytes) -> None:
    with pytest.raises(ImportFailed, match="negative size"):
        target.apply(tar_of([member("first")])[:512] + oversized("a", type, -512) + bytes(10240))


def altered(info: tarfile.TarInfo, start: int, data: bytes) -> bytes:
    """GNU's header of it, with these bytes in the place of its own."""
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    at = len(header) - tarfile.BLOCKSIZE
    header[at + start : at + start + len(data)] = data
    header[at + 148 : at + 156] = b" " * 8
    header[at + 148 : at + 156] = b"%06o\0 " % sum(header[at:])
    return bytes(header)


def test_times_of_access_in_gnu_headers_are_no_part_of_the_name(target: Any) -> None:
    plain, rare = member("file")[0], member("rare", uid=1 << 22)[0]  # whose number is in base 256
    others = [member("fifo", tarfile.FIFOTYPE)[0], member("directory", tarfile.DIRTYPE)[0], member("long" * 50)[0], member("/absolute")[0]]
    target.apply(b"".join(altered(info, 345, b"14263456701\0" * 2) for info in (plain, rare, *others)) + bytes(1024))
    assert names(target) == {"", "file", "rare", "fifo", "directory", "long" * 50, "absolute"}


def members_of(tar: bytes) -> bytes:
    """Without the end of the archive."""
    members = tar.rstrip(b"\0")
    return members + bytes(-len(members) % tarfile.BLOCKSIZE)


DAMAGED = {
    "header": altered(member("own")[0], 0, b"own")[:300] + b"?" + altered(member("own")[0], 0, b"own")[301:],
    "header behind a long name": altered(member("own" * 50)[0], 0, b"own")[:-300] + b"?" + altered(member("own" * 50)[0], 0, b"own")[-299:],
    "number": altered(member("own")[0], 100, b"rw-r--r"),
    "header of PAX": members_of(tar_of([member("own", pax={"comment": "x"})])).replace(b"13 comment=x", b"99 comment=x"),
    "sparse file's map": members_of(tar_of([sparse("own", "-1\n")])),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_never_the_end(target: Any, what: str) -> None:
    """tarfile takes some of it for that, some it reads as something; which, changes with its version."""
    try:
        target.apply(members_of(tar_of([member("first")])) + DAMAGED[what] + tar_of([member("last")]))
    except ImportFailed:
        return
    assert "last" in names(target)


@pytest.mark.parametrize("type", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_without_bound_are_damage(target: Any, type: bytes) -> None:
    with pytest.raises(ImportFailed, match="one of 1099511627776 bytes"):
        target.apply(oversized("a", type, 1 << 40) + bytes(10240))


def test_headers_within_headers_without_end_are_damage(target: Any) -> None:
    long_name = tar_of([member("n" * 200)], format=tarfile.GNU_FORMAT)[:1024]
    with pytest.raises(ImportFailed, match="damaged"):
        target.apply(long_name * 3000 + tar_of([member("a")]))


def test_xattrs_as_libarchive_writes_them(target: Any) -> None:
    binary = bytes(range(16)) + b"\xff"
    pax = {"LIBARCHIVE.xattr.user.a%20b": base64.b64encode(binary).decode().rstrip("="), "LIBARCHIVE.xattr.user.c": "eA", "SCHILY.xattr.user.c": "y"}
    target.apply(tar_of([member("file", pax=pax)]))
    assert tree_of(target)["file"]["xattrs"] == {"user.a b": binary, "user.c": b"y"}


def data_of(path: Path) -> tuple[int, list[tuple[int, bytes]]]:
    """A file's size, and its data by offset, holes and zeros left out."""
    found, end = [], 0
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # a hole until the end
                break
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, os.pread(file.fileno(), end - start, start)))
    return size, found


def test_sparse_files_larger_than_the_file_system_are_sparse_in_it(target: Any) -> None:
    """As old GNU tar stores them, its size in base 256 since it is over 8 GiB; and in PAX 1.0 with the stored size in the PAX header."""
    old, _ = member("old", tarfile.GNUTYPE_SPARSE)
    header = bytearray(old.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % 4096
    header[386:410] = tarfile.itn(9 << 30, 12, tarfile.GNU_FORMAT) + b"%011o\0" % 4096  # type: ignore[attr-defined]
    header[483:495] = tarfile.itn(10 << 30, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    new = sparse("new", "1\n1048576\n4096\n", b"b" * 4096, 2 << 20, size=str(512 + 4096))
    made = tar_of([new, member("last", content=b"c")])
    target.apply(bytes(header) + b"a" * 4096 + made)
    with target.readable() as directory:
        assert data_of(directory / "old") == (10 << 30, [(9 << 30, b"a" * 4096)])
        assert data_of(directory / "new") == (2 << 20, [(1 << 20, b"b" * 4096)])
        assert (directory / "last").read_bytes() == b"c"
