"""Changes as an OCI layer tar: the OCI image specification's "Image Layer Filesystem Changeset".

The same changes give the same bytes: members sorted by path, a directory before what is in it; numbers for owners, without names; PAX headers
only where the plain ones are too narrow (long names, fractions of seconds, extended attributes as ``SCHILY.xattr.``).

A whiteout says that a path is gone; none is needed for what was in it, nor where something of another type is in its place. Of a file with
several names the first holds the content, the others are hard links to it. Sparse files are written in full, which every tool reads.
Sockets are left out, as by all tools: a tar has no form for them.
"""

from __future__ import annotations

import base64
import os
import stat
import tarfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from ..errors import LayerState
from .changes import PathChange
from .tree import Path

if TYPE_CHECKING:
    from .ext4 import Attributes, Ext4

_PIECE = 1 << 20
_WHITEOUT = ".wh."
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def write_layer(out: BinaryIO, changes: Iterable[PathChange], layer: Ext4) -> None:
    """Writes the changes found in ``layer``. Raises LayerState for names that a layer tar takes for whiteouts."""
    first: dict[int, str] = {}  # the name that has the content, by inode
    for change in sorted(changes):
        for part in change.path:
            if part.startswith(_WHITEOUT):
                raise LayerState(f"/{'/'.join(change.path)} cannot be in an image: names that begin with .wh. mean deleted files there. Rename or remove it")
        if change.kind == "D":
            _write_whiteout(out, change.path)
            continue
        attributes = layer.attributes(change.inode)
        if stat.S_ISSOCK(attributes.mode):
            if change.kind == "C":
                _write_whiteout(out, change.path)
            continue
        member = _member(change.path, attributes)
        if change.inode in first:
            member.type, member.linkname = tarfile.LNKTYPE, first[change.inode]
        else:
            _add_content(member, change.inode, attributes, layer)
            if not stat.S_ISDIR(attributes.mode):
                first[change.inode] = member.name
        _write(out, member)
        if member.isreg():
            _write_content(out, change.inode, member.size, layer)
    out.write(bytes(2 * tarfile.BLOCKSIZE))


def _member(path: Path, attributes: Attributes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("/".join(path) or ".")
    member.type = _TYPES[stat.S_IFMT(attributes.mode)]
    member.mode, member.uid, member.gid = stat.S_IMODE(attributes.mode), attributes.uid, attributes.gid
    member.mtime, fraction = divmod(attributes.mtime_ns, 10**9)
    if fraction:
        seconds, nanoseconds = divmod(abs(attributes.mtime_ns), 10**9)
        member.pax_headers = {"mtime": f"{'-' if attributes.mtime_ns < 0 else ''}{seconds}.{nanoseconds:09}"}
    return member


def _add_content(member: tarfile.TarInfo, inode: int, attributes: Attributes, layer: Ext4) -> None:
    headers = dict(member.pax_headers)
    for key, value in sorted(layer.xattrs(inode).items()):
        if "=" in key or not key.isprintable():  # what cannot be a keyword in PAX headers
            headers[f"LIBARCHIVE.xattr.{quote(key, errors='surrogateescape')}"] = base64.b64encode(value).decode()
        else:
            headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
    member.pax_headers = headers
    if member.isreg():
        member.size = attributes.size
    elif member.issym():
        member.linkname = os.fsdecode(layer.readlink(inode))
    elif member.ischr() or member.isblk():
        member.devmajor, member.devminor = os.major(attributes.rdev), os.minor(attributes.rdev)


def _write(out: BinaryIO, member: tarfile.TarInfo) -> None:
    out.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))


def _write_whiteout(out: BinaryIO, path: Path) -> None:
    member = tarfile.TarInfo("/".join((*path[:-1], _WHITEOUT + path[-1])))
    member.mode = 0
    _write(out, member)


def _write_content(out: BinaryIO, inode: int, size: int, layer: Ext4) -> None:
    done = 0
    while done < size:
        piece = layer.read(inode, min(_PIECE, size - done), done)
        assert piece, "the file is as long as its inode says"
        out.write(piece)
        done += len(piece)
    out.write(bytes(-size % tarfile.BLOCKSIZE))
