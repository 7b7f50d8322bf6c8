"""What a layer tar is applied to: :class:`FileTree`, and :class:`MountedTree`, one that is a directory of the host.

Paths are tuples of names below the root (``()`` is the root itself; bytes that are no UTF-8 as surrogates). No method follows a
symbolic link, in no part of a path: one on the way is refused.

Filling a directory changes its times. A tree gives them back at :meth:`FileTree.finish`: to directories that were made or set, what they
were given; to others that were touched, what they had.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from ..api import Buffer
from ..errors import ImportFailed

Path = tuple[str, ...]
Xattrs = Mapping[str, bytes]
Pieces = Iterable[tuple[int, Buffer]]
_KEPT_XATTRS = ("security.selinux",)  # the host's policy says what files have here


@dataclass(frozen=True, slots=True)
class Attributes:
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    rdev: int = 0
    links: int = 1
    inode: int = 0


class FileTree(Protocol):
    """A tree of files, with everything that a file has on Linux."""

    def kind(self, path: Path) -> int | None:
        """Its type (``stat.S_IFMT`` bits), or ``None``: not there. Raises ImportFailed where the way leads through what is no directory."""

    def names(self, path: Path) -> list[str]:
        """What is in a directory."""

    def make_directory(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        """Makes an empty one. As all ``make_`` methods: in a directory that is there, under a name that is free."""

    def set_directory(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        """Replaces all attributes of one that is there, and keeps what is in it."""

    def make_file(self, path: Path, attributes: Attributes, xattrs: Xattrs, size: int, pieces: Pieces) -> None:
        """Makes a regular file of so many bytes. ``pieces``: (offset, data) in order; between them are holes."""

    def make_symlink(self, path: Path, attributes: Attributes, xattrs: Xattrs, target: str) -> None:
        """Makes a symbolic link."""

    def make_node(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        """Makes a device (``attributes.rdev``), a fifo or a socket."""

    def link(self, path: Path, target: Path) -> None:
        """Gives what is at ``target``, and no directory, another name."""

    def remove(self, path: Path) -> None:
        """Removes what is there, with everything below."""

    def finish(self) -> None:
        """To be called at the end."""


class MountedTree:
    """A directory of the host, filled as root. A context manager: it keeps descriptors."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._opened: Path = ()  # the directory used last, kept open: members of one come together
        self._opened_fd = os.dup(self._root)
        self._set: dict[Path, tuple[Attributes, Xattrs]] = {}  # directories that finish() gives their attributes,
        self._touched: dict[Path, int] = {}  # and ones that it gives back their time of modification. Both may name what was removed since

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._root >= 0:
            os.close(self._opened_fd)
            os.close(self._root)
            self._root = -1

    # --- the way to a path ---

    def _open(self, path: Path) -> int:
        """A descriptor of a directory, which is the tree's to close."""
        if path == self._opened:
            return self._opened_fd
        fd = os.dup(self._root)
        for name in path:
            try:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise ImportFailed(f"{'/'.join(path)!r} leads through {name!r}, which is no directory but a link or a file") from None
                raise
            finally:
                os.close(fd)
            fd = below
        os.close(self._opened_fd)
        self._opened, self._opened_fd = path, fd
        return fd

    def _enter(self, path: Path) -> int:
        """The directory that holds ``path``, about to be changed."""
        parent = path[:-1]
        fd = self._open(parent)
        if parent not in self._touched:
            self._touched[parent] = os.fstat(fd).st_mtime_ns
        return fd

    # --- looking ---

    def kind(self, path: Path) -> int | None:
        if not path:
            return stat.S_IFDIR
        try:
            return stat.S_IFMT(os.stat(path[-1], dir_fd=self._open(path[:-1]), follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return None

    def names(self, path: Path) -> list[str]:
        return os.listdir(self._open(path))

    # --- making ---

    def make_directory(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        os.mkdir(path[-1], 0o700, dir_fd=self._enter(path))
        self._set[path] = attributes, xattrs

    def set_directory(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        self._set[path] = attributes, xattrs

    def make_file(self, path: Path, attributes: Attributes, xattrs: Xattrs, size: int, pieces: Pieces) -> None:
        fd = os.open(path[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._enter(path))
        try:
            for offset, data in pieces:
                view = memoryview(data)
                while view:
                    written = os.pwrite(fd, view, offset)
                    offset, view = offset + written, view[written:]
            os.ftruncate(fd, size)
            _set_attributes(fd, attributes, xattrs)
        finally:
            os.close(fd)

    def make_symlink(self, path: Path, attributes: Attributes, xattrs: Xattrs, target: str) -> None:
        parent = self._enter(path)
        os.symlink(target, path[-1], dir_fd=parent)
        _set_attributes_at(parent, path[-1], attributes, xattrs)

    def make_node(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        parent = self._enter(path)
        os.mknod(path[-1], stat.S_IFMT(attributes.mode) | 0o600, attributes.rdev, dir_fd=parent)
        _set_attributes_at(parent, path[-1], attributes, xattrs)

    def link(self, path: Path, target: Path) -> None:
        source = os.dup(self._open(target[:-1]))
        try:
            os.link(target[-1], path[-1], src_dir_fd=source, dst_dir_fd=self._enter(path), follow_symlinks=False)
        finally:
            os.close(source)

    def remove(self, path: Path) -> None:
        parent, name = self._enter(path), path[-1]
        try:
            os.unlink(name, dir_fd=parent)
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=parent)

    # --- the end ---

    def finish(self) -> None:
        for path in {*self._set, *self._touched}:
            try:
                fd = self._open(path)
            except (FileNotFoundError, ImportFailed):  # removed since, or something else is in its place
                continue
            if path in self._set:
                _set_attributes(fd, *self._set[path])
            else:
                os.utime(fd, ns=(self._touched[path], self._touched[path]))
        self._set, self._touched = {}, {}


def _set_attributes(fd: int, attributes: Attributes, xattrs: Xattrs) -> None:
    """Of a file or directory. The owner first: changing it takes set-id bits and capabilities away."""
    os.fchown(fd, attributes.uid, attributes.gid)
    os.fchmod(fd, stat.S_IMODE(attributes.mode))
    for key in os.listxattr(fd):
        if key not in xattrs and key not in _KEPT_XATTRS:
            os.removexattr(fd, key)
    for key, value in xattrs.items():
        os.setxattr(fd, key, value)
    os.utime(fd, ns=(attributes.mtime_ns, attributes.mtime_ns))


def _set_attributes_at(parent: int, name: str, attributes: Attributes, xattrs: Xattrs) -> None:
    """Of what cannot be opened: a symbolic link, which has no mode, or a device."""
    os.chown(name, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISLNK(attributes.mode):
        os.chmod(name, stat.S_IMODE(attributes.mode), dir_fd=parent)
    for key, value in xattrs.items():
        os.setxattr(f"/proc/self/fd/{parent}/{name}", key, value, follow_symlinks=False)
    os.utime(name, ns=(attributes.mtime_ns, attributes.mtime_ns), dir_fd=parent, follow_symlinks=False)
