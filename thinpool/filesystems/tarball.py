"""Unpacks a root file system tarball into a directory, as root, keeping everything a tarball can say.

Owners (by number), modes, times to the nanosecond, hard and symbolic links, devices, fifos, extended attributes (PAX
``SCHILY.xattr.*``), sparse files (GNU and PAX). The formats: POSIX.1-2017 pax, and GNU tar's manual, "Basic Tar Format".

Names come from outside. Each is walked from the root directory down by descriptors that do not follow symbolic links, so
that neither ``..`` nor a link on the way can lead out. tarfile parses; it is made strict: what it would pass over as
the end of the archive (a damaged header, a missing end) is an error here.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any

from ..api import Progress
from ..errors import ImportFailed, OutOfSpace

_PIECE_BYTES = 1 << 20
_XATTR_PREFIX = "SCHILY.xattr."
_BROKEN_STREAM = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged, or missing before the end-of-archive marker, is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            what = f"damaged header ({error})" if len(buf) == tarfile.BLOCKSIZE else "cut short: no end-of-archive marker"
            raise tarfile.ReadError(what) from None


class _Counted(io.RawIOBase):
    """The tarball's file, telling how much of it has been read."""

    def __init__(self, file: IO[bytes], progress: Progress | None) -> None:
        super().__init__()
        self._file, self._progress, self._done = file, progress, 0
        self._size = os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._done += count
        if self._progress:
            self._progress(self._done, self._size)
        return int(count)


def _decompressed(raw: io.BufferedReader, path: Path) -> Any:
    magic = raw.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(raw)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise ImportFailed(f"{path} is compressed with zstd: pip install 'thinpool[zstd]' to read it") from None
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return raw


@contextmanager
def _opened(path: Path, progress: Progress | None) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ImportFailed(f"cannot read {path}: {error.strerror}") from error
    with file:
        stream = _decompressed(io.BufferedReader(_Counted(file, progress), _PIECE_BYTES), path)
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_PIECE_BYTES, tarinfo=_StrictTarInfo) as tar:
            yield tar, stream


def unpack(path: Path, directory: Path, *, progress: Progress | None = None) -> None:
    """Unpacks the tarball (plain, gzip, xz, bzip2 or zstd) into the directory. Needs root, for owners and devices.

    Raises :class:`~thinpool.errors.ImportFailed`, naming the member, for a tarball that is damaged, cut short, or would
    write outside the directory, and OutOfSpace. What was unpacked until then stays.
    """
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    member = "its start"
    tree = _Tree(root)
    try:
        with _opened(path, progress) as (tar, stream):
            for info in tar:
                member = info.name
                tree.add(tar, info)
            member = "its end"
            while stream.read(_PIECE_BYTES):  # to the end: the stream's own checksum is there
                continue
        tree.finish()
    except (tarfile.TarError, *_BROKEN_STREAM) as error:
        raise ImportFailed(f"{path} is damaged at {member}: {error}") from error
    except ImportFailed as error:
        raise ImportFailed(f"{path}: {error}") from error
    except (ValueError, OverflowError, IndexError) as error:  # numbers out of range, names with NUL, sparse maps that end early
        raise ImportFailed(f"{path} is damaged at {member}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"no room for {member} of {path}: give the layer a larger size, or the pool more capacity") from error
        raise ImportFailed(f"{path}: cannot unpack {member}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard") or type(error).__name__ == "ZstdError":
            raise ImportFailed(f"{path} is damaged at {member}: {error}") from error
        raise
    finally:
        tree.close()
        os.close(root)


@dataclass(slots=True)
class _Attributes:
    uid: int
    gid: int
    mode: int
    mtime_ns: int
    xattrs: dict[str, bytes]


def _attributes(info: tarfile.TarInfo) -> _Attributes:
    mtime_ns = int(info.mtime) * 1_000_000_000
    if "mtime" in info.pax_headers:  # TarInfo keeps a float of it
        try:
            mtime_ns = int(Decimal(info.pax_headers["mtime"]) * 1_000_000_000)
        except InvalidOperation:
            raise ImportFailed(f"{info.name} has a time that is no number: {info.pax_headers['mtime']!r}") from None
    xattrs = {
        key.removeprefix(_XATTR_PREFIX): value.encode("utf-8", "surrogateescape") for key, value in info.pax_headers.items() if key.startswith(_XATTR_PREFIX)
    }
    return _Attributes(info.uid, info.gid, stat.S_IMODE(info.mode), mtime_ns, xattrs)


def _parts(name: str) -> tuple[str, ...]:
    """A member's name as components below the root: ``/`` and ``./`` in front mean nothing, ``..`` is refused."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise ImportFailed(f"{name!r} climbs out of the root file system")
    return parts


class _Tree:
    """The directory that is filled."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._parent: tuple[str, ...] = ()  # the directory used last, kept open: members of one come together
        self._parent_fd = os.dup(root)
        self._directories: dict[tuple[str, ...], _Attributes] = {}  # set at the end: filling a directory changes its times

    def finish(self) -> None:
        """Sets the directories' attributes, the deepest first."""
        for parts in sorted(self._directories, key=len, reverse=True):
            fd = os.open(parts[-1], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._open_parent(parts)) if parts else os.dup(self._root)
            try:
                _set_attributes(fd, self._directories[parts])
            finally:
                os.close(fd)

    def close(self) -> None:
        os.close(self._parent_fd)

    def _open_parent(self, parts: tuple[str, ...]) -> int:
        """A descriptor of the directory that holds ``parts``; missing ones on the way are made."""
        wanted = parts[:-1]
        if wanted == self._parent:
            return self._parent_fd
        fd = os.dup(self._root)
        for part in wanted:
            try:
                try:
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                except FileNotFoundError:
                    os.mkdir(part, 0o755, dir_fd=fd)
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise ImportFailed(f"{'/'.join(parts)!r} leads through {part!r}, which is no directory but a link or a file") from None
                raise
            finally:
                os.close(fd)
            fd = below
        os.close(self._parent_fd)
        self._parent, self._parent_fd = wanted, fd
        return fd

    def add(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Makes one member."""
        parts = _parts(info.name)
        if not parts:
            if not info.isdir():
                raise ImportFailed(f"{info.name!r} would replace the root directory")
            self._directories[()] = _attributes(info)
            return
        parent, name = self._open_parent(parts), parts[-1]
        if info.isdir():
            self._make_directory(parent, parts)
            self._directories[parts] = _attributes(info)
            return
        if not info.islnk():
            self._clear(parent, name, parts)
        if info.isreg():
            self._make_file(tar, info, parent, name)
        elif info.islnk():
            self._make_hard_link(info, parts)
        elif info.issym():
            os.symlink(info.linkname, name, dir_fd=parent)
            _set_attributes_at(parent, name, _attributes(info), link=True)
        elif info.ischr() or info.isblk() or info.isfifo():
            kind = stat.S_IFIFO if info.isfifo() else stat.S_IFCHR if info.ischr() else stat.S_IFBLK
            device = 0 if info.isfifo() else os.makedev(info.devmajor, info.devminor)
            os.mknod(name, kind | 0o600, device, dir_fd=parent)
            _set_attributes_at(parent, name, _attributes(info), link=False)
        else:
            raise ImportFailed(f"{info.name!r} is of a type that is not known: {info.type!r}")

    @staticmethod
    def _make_directory(parent: int, parts: tuple[str, ...]) -> None:
        try:
            os.mkdir(parts[-1], 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(parts[-1], dir_fd=parent, follow_symlinks=False).st_mode):
                os.unlink(parts[-1], dir_fd=parent)
                os.mkdir(parts[-1], 0o700, dir_fd=parent)

    def _clear(self, parent: int, name: str, parts: tuple[str, ...]) -> None:
        """A later member takes the place of an earlier one."""
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            try:
                os.rmdir(name, dir_fd=parent)
            except OSError as error:
                raise ImportFailed(f"{'/'.join(parts)!r} would replace a directory that is not empty") from error
            self._directories.pop(parts, None)

    @staticmethod
    def _make_file(tar: tarfile.TarFile, info: tarfile.TarInfo, parent: int, name: str) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            content: Any = tar.fileobj  # not extractfile(): its files cannot skip the holes of a sparse one in a stream
            content.seek(info.offset_data)  # the pieces of a sparse file follow one another there
            sparse: Any = info.sparse
            for start, length in [(0, info.size)] if sparse is None else sparse:
                _copy(content, fd, start, length)
            os.ftruncate(fd, info.size)
            _set_attributes(fd, _attributes(info))
        finally:
            os.close(fd)

    def _make_hard_link(self, info: tarfile.TarInfo, parts: tuple[str, ...]) -> None:
        target = _parts(info.linkname)
        if target == parts:
            return
        if not target:
            raise ImportFailed(f"{info.name!r} is a hard link to nothing")
        source = os.dup(self._open_parent(target))
        try:
            parent = self._open_parent(parts)
            self._clear(parent, parts[-1], parts)
            os.link(target[-1], parts[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise ImportFailed(f"{info.name!r} is a hard link to {info.linkname!r}, which is not there") from None
        finally:
            os.close(source)


def _copy(content: IO[bytes], fd: int, start: int, length: int) -> None:
    end = start + length
    while start < end:
        piece = content.read(min(_PIECE_BYTES, end - start))
        if not piece:
            raise tarfile.ReadError("unexpected end of data")
        view = memoryview(piece)
        while view:
            written = os.pwrite(fd, view, start)
            start += written
            view = view[written:]


def _set_attributes(fd: int, attributes: _Attributes) -> None:
    """Of a file or directory. The owner first: changing it takes set-id bits and capabilities away."""
    os.fchown(fd, attributes.uid, attributes.gid)
    os.fchmod(fd, attributes.mode)
    for key, value in attributes.xattrs.items():
        os.setxattr(fd, key, value)
    os.utime(fd, ns=(attributes.mtime_ns, attributes.mtime_ns))


def _set_attributes_at(parent: int, name: str, attributes: _Attributes, *, link: bool) -> None:
    """Of what cannot be opened: a symbolic link, which has no mode, or a device."""
    os.chown(name, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
    if not link:
        os.chmod(name, attributes.mode, dir_fd=parent)
    for key, value in attributes.xattrs.items():
        os.setxattr(f"/proc/self/fd/{parent}/{name}", key, value, follow_symlinks=False)
    os.utime(name, ns=(attributes.mtime_ns, attributes.mtime_ns), dir_fd=parent, follow_symlinks=False)
