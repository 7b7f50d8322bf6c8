"""The seam to the file system library: an ext4 in a layer, read and edited without mounting it, and without root.

:class:`Ext4` passes calls on to csrc/ext4/, which stands on libext2fs, and turns its error codes into exceptions. Blocks move between the
library and the layer in C. The same operations on the same file system give the same bytes, so that equal image layers are equal blocks.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from ..api import Buffer
from ..engine import io_addresses
from ..errors import DamagedError, LayerState, OutOfSpace, ToolFailed
from .tree import Attributes

__all__ = ["Attributes", "Ext4", "available"]

if TYPE_CHECKING:
    from ..layer import Layer

try:
    from .._ext4 import ffi, lib
except ImportError:  # built without libext2fs
    ffi = lib = None

CHUNK_BLOCKS = 16
_MAGIC_AT, _MAGIC = 1024 + 0x38, b"\x53\xef"  # fs/ext4/ext4.h, s_magic
ALIGN_LARGE_BLOCKS = 16
"""Files of at least so many blocks begin at a chunk's begin (measured: docs/DESIGN.md, "Images")."""

_ENTRY = struct.Struct("=III")
_XATTR = struct.Struct("=II")
_TARGET_BYTES_MAX = 4096


def available() -> bool:
    """Whether the library is there."""
    return lib is not None


class Ext4:
    """An ext4 file system in a layer. Inodes are known by number; times are in nanoseconds since 1970.

    A context manager: leaving it writes everything to the layer, unless by an exception. One thread at a time. Raises LayerState where there is
    none, for one that must be repaired or has its journal replayed first, or has features that are not known here; ToolFailed where
    the library is not built; DamagedError, OutOfSpace, and the builtin exceptions of the file operations.
    """

    ROOT = 2

    def __init__(self, layer: Layer, *, writable: bool = False, align_large: int = ALIGN_LARGE_BLOCKS, align_directories: bool = False) -> None:
        """``align_large`` (blocks, 0: none), ``align_directories``: which files begin at the begin of a chunk."""
        if lib is None:
            raise ToolFailed("reading file systems without mounting them needs libext2fs: install libext2fs-dev and build thinpool again")
        self.layer = layer
        if layer.size < _MAGIC_AT + len(_MAGIC) or layer.pread(len(_MAGIC), _MAGIC_AT) != _MAGIC:
            raise LayerState(f"layer {layer.name} has no ext4 file system")
        read, write, discard = io_addresses()
        disk = ffi.new("e4_disk *")
        disk.ctx = ffi.cast("void *", layer.handle.address)
        disk.read = ffi.cast("int (*)(void *, void *, uint64_t, uint64_t)", read)
        disk.write = ffi.cast("int (*)(void *, const void *, uint64_t, uint64_t)", write)
        disk.discard = ffi.cast("int (*)(void *, uint64_t, uint64_t)", discard)
        policy = ffi.new("e4_policy *", {"chunk_blocks": CHUNK_BLOCKS, "align_large": align_large, "align_directories": align_directories})
        out = ffi.new("e4_fs **")
        rc = lib.e4_open(disk, policy, writable, out)
        self._fs = out[0]
        self._attributes, self._number, self._kind = ffi.new("e4_attributes *"), ffi.new("uint32_t *"), ffi.new("uint32_t *")
        try:
            self._check(rc)
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __del__(self) -> None:
        self.abandon()

    def close(self) -> None:
        """Writes everything to the layer."""
        if getattr(self, "_fs", None):
            try:
                self.sync()
            finally:
                self.abandon()

    def sync(self) -> None:
        """The same, and stays open."""
        self._check(lib.e4_sync(self._fs))

    def abandon(self) -> None:
        """Lets go of it; what was not written to the layer yet is lost."""
        if lib is not None and getattr(self, "_fs", None):
            lib.e4_free(self._fs)
            self._fs = None

    def _check(self, rc: int, what: object = "") -> int:
        if rc >= 0:
            return int(rc)
        if rc == lib.E4_EDISK:
            self.layer.handle.raise_error(lib.e4_disk_error(self._fs))
        message = ffi.string(lib.e4_message(self._fs)).decode(errors="replace")
        raise _ERRORS[rc](self.layer.name, message, what)

    # --- looking ---

    def lookup(self, directory: int, name: bytes) -> tuple[int, int] | None:
        """(inode, type as ``stat.S_IFMT`` bits) of a name; ``None``: there is none. Raises NotADirectoryError."""
        rc = lib.e4_lookup(self._fs, directory, name, len(name), self._number, self._kind)
        if rc == lib.E4_ENOENT:
            return None
        self._check(rc, name)
        return self._number[0], self._kind[0]

    def entries(self, directory: int) -> list[tuple[bytes, int, int]]:
        """(name, inode, type) of all that is in a directory, but for ``.`` and ``..``."""
        return sorted(self._packed(lib.e4_entries, directory, _parse_entries))

    def _packed(self, call: Any, inode: int, parse: Callable[[bytes], Iterator[Any]]) -> list[Any]:
        data, length = ffi.new("char **"), ffi.new("uint64_t *")
        self._check(call(self._fs, inode, data, length), inode)
        try:
            return list(parse(bytes(ffi.buffer(data[0], length[0]))))
        finally:
            lib.e4_release(data[0])

    def _ranges(self, call: Any, inode: int) -> list[tuple[int, int]]:
        out = ffi.new("e4_range **")
        count = self._check(call(self._fs, inode, out), inode)
        try:
            return [(out[0][i].offset, out[0][i].length) for i in range(count)]
        finally:
            lib.e4_release(out[0])

    def attributes(self, inode: int) -> Attributes:
        """What stat(2) says."""
        a = self._attributes
        self._check(lib.e4_get_attributes(self._fs, inode, a), inode)
        return Attributes(a.mode, a.uid, a.gid, a.mtime * 1_000_000_000 + a.mtime_ns, a.size, os.makedev(a.major, a.minor), a.links, inode)

    def change_time_ns(self, inode: int) -> int:
        """When the inode was last changed."""
        self._check(lib.e4_get_attributes(self._fs, inode, self._attributes), inode)
        return int(self._attributes.ctime) * 1_000_000_000 + int(self._attributes.ctime_ns)

    def xattrs(self, inode: int) -> dict[str, bytes]:
        """Extended attributes, as getxattr(2) gives them."""
        return dict(self._packed(lib.e4_xattrs, inode, _parse_xattrs))

    def readlink(self, inode: int) -> bytes:
        """What a symbolic link says."""
        buffer = bytearray(_TARGET_BYTES_MAX)
        length = self._check(lib.e4_readlink(self._fs, inode, ffi.from_buffer(buffer), len(buffer)), inode)
        return bytes(buffer[:length])

    def read(self, inode: int, length: int, offset: int) -> bytes:
        """Bytes of a file; fewer at its end. Holes are zeros."""
        buffer = bytearray(length)
        count = self._check(lib.e4_read(self._fs, inode, ffi.from_buffer(buffer), length, offset), inode)
        return bytes(buffer) if count == length else bytes(memoryview(buffer)[:count])

    def extents(self, inode: int) -> list[tuple[int, int]]:
        """(offset, length) of a file's data in bytes; the rest are holes."""
        return self._ranges(lib.e4_data, inode)

    # --- changing ---

    def make(self, directory: int, name: bytes, attributes: Attributes, *, target: bytes = b"", xattrs: Mapping[str, bytes] | None = None) -> int:
        """Makes anything but a hard link, and returns its inode; a regular file is empty. ``target``: of a symbolic link."""
        self._check(lib.e4_make(self._fs, directory, name, len(name), self._given(attributes), target, len(target), self._number), name)
        inode = int(self._number[0])
        for key, value in (xattrs or {}).items():
            self._set_xattr(inode, key, value)
        return inode

    def _given(self, attributes: Attributes) -> Any:
        a = self._attributes
        a.mode, a.uid, a.gid, a.generation = attributes.mode, attributes.uid, attributes.gid, 0
        a.major, a.minor = os.major(attributes.rdev), os.minor(attributes.rdev)
        a.mtime, a.mtime_ns = divmod(attributes.mtime_ns, 1_000_000_000)
        return a

    def _set_xattr(self, inode: int, key: str, value: bytes | None) -> None:
        data = ffi.NULL if value is None else ffi.from_buffer(value or b"\0")
        self._check(lib.e4_set_xattr(self._fs, inode, key.encode("utf-8", "surrogateescape"), data, len(value or b"")), key)

    def link(self, directory: int, name: bytes, inode: int) -> None:
        """One more name for a file."""
        self._check(lib.e4_link(self._fs, directory, name, len(name), inode), name)

    def unlink(self, directory: int, name: bytes) -> None:
        """Takes a name away, and what it named with its last one. Raises OSError(ENOTEMPTY) for a directory with something in it."""
        self._check(lib.e4_unlink(self._fs, directory, name, len(name)), name)

    def set_attributes(self, inode: int, attributes: Attributes, xattrs: Mapping[str, bytes]) -> None:
        """Replaces mode, owner, times and all extended attributes; not the type, size or device."""
        self._check(lib.e4_set_attributes(self._fs, inode, self._given(attributes)), inode)
        there = self.xattrs(inode)
        for key in there.keys() - xattrs.keys():
            self._set_xattr(inode, key, None)
        for key, value in xattrs.items():
            if there.get(key) != value:
                self._set_xattr(inode, key, value)

    def write(self, inode: int, data: Buffer, offset: int, *, size: int = 0) -> None:
        """Writes to a file, which grows. Quick for a new file that is written from front to back; ``size``: what it will have."""
        view = ffi.from_buffer(data)
        self._check(lib.e4_write(self._fs, inode, view, len(view), offset, size), inode)

    def truncate(self, inode: int, size: int) -> None:
        """Changes the size; what is added is a hole."""
        self._check(lib.e4_truncate(self._fs, inode, size), inode)

    # --- where things lie, for comparing two file systems by their blocks ---

    @property
    def inode_size(self) -> int:
        """Bytes of an inode in its table."""
        return int(lib.e4_inode_size(self._fs))

    def inode_tables(self) -> list[tuple[int, int, int]]:
        """(number of the first inode, offset, length) of each inode table, in bytes."""
        each, found, tables = lib.e4_inodes_per_group(self._fs), ffi.new("e4_range *"), []
        for group in range(lib.e4_groups(self._fs)):
            self._check(lib.e4_inode_table(self._fs, group, found))
            tables.append((group * each + 1, found.offset, found.length))
        return tables

    def metadata_ranges(self) -> list[tuple[int, int]]:
        """(offset, length) of what belongs to the file system itself: superblocks, descriptors, bitmaps, inode tables."""
        found, ranges = ffi.new("e4_range[6]"), []
        for group in range(lib.e4_groups(self._fs)):
            count = self._check(lib.e4_group_metadata(self._fs, group, found))
            ranges += [(found[i].offset, found[i].length) for i in range(count)]
        return ranges

    def blocks(self, inode: int) -> list[tuple[int, int]]:
        """(offset, length) in the layer of all that an inode has, its own metadata too."""
        return self._ranges(lib.e4_blocks, inode)

    def in_use(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the blocks in use that a range of the layer touches."""
        found, end = ffi.new("e4_range *"), offset + length
        while self._check(lib.e4_next_used(self._fs, offset, end, found)):
            yield found.offset, found.length
            offset = found.offset + found.length


def _parse_entries(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 0
    while at < len(data):
        inode, kind, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size + length
        yield data[at - length : at], inode, kind


def _parse_xattrs(data: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(data):
        name_length, length = _XATTR.unpack_from(data, at)
        at += _XATTR.size
        yield data[at : at + name_length].decode("utf-8", "surrogateescape"), data[at + name_length : at + name_length + length]
        at += name_length + length


def _os_error(code: int) -> Callable[[str, str, object], Exception]:
    return lambda layer, message, what: OSError(code, os.strerror(code), str(what))


_ERRORS: dict[int, Callable[[str, str, object], Exception]] = {}
if lib is not None:
    _ERRORS = {
        lib.E4_ENOSPC: lambda layer, message, what: OutOfSpace(f"the file system of layer {layer} is full: give it a larger size"),
        lib.E4_ENOENT: _os_error(errno.ENOENT),
        lib.E4_EEXIST: _os_error(errno.EEXIST),
        lib.E4_ENOTDIR: _os_error(errno.ENOTDIR),
        lib.E4_ENOTEMPTY: _os_error(errno.ENOTEMPTY),
        lib.E4_EISDIR: _os_error(errno.EISDIR),
        lib.E4_EMLINK: _os_error(errno.EMLINK),
        lib.E4_EINVAL: _os_error(errno.EINVAL),
        lib.E4_ENOMEM: _os_error(errno.ENOMEM),
        lib.E4_EDAMAGED: lambda layer, message, what: DamagedError(f"the ext4 file system of layer {layer} is damaged: {message}"),
        lib.E4_EUNSUPPORTED: lambda layer, message, what: LayerState(
            f"the file system of layer {layer} has features that cannot be handled without mounting it {message}".rstrip()
        ),
        lib.E4_EDIRTY: lambda layer, message, what: LayerState(
            f"the file system of layer {layer} is in use, or was not unmounted cleanly: mount it once, so that its journal is replayed"
        ),
    }
