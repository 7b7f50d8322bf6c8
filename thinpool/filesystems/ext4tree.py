"""The tree of files in a layer's ext4, as layer tars are applied to it: :class:`Ext4Tree`."""

from __future__ import annotations

import errno
import os
import stat

from ..errors import ImportFailed
from .ext4 import Ext4
from .tree import Attributes, Path, Pieces, Xattrs


class Ext4Tree:
    """A :class:`~thinpool.filesystems.tree.FileTree` over an :class:`~thinpool.filesystems.ext4.Ext4` open for writing.

    Nothing here changes a time that was not given, so directories need no second visit. The inodes of directories are remembered: members
    of one come together.
    """

    def __init__(self, filesystem: Ext4) -> None:
        self._fs = filesystem
        self._directories: dict[Path, int] = {(): Ext4.ROOT}

    def _directory(self, path: Path) -> int | None:
        """Its inode; ``None``: not there. Raises ImportFailed where something else is."""
        known = self._directories.get(path)
        if known is not None:
            return known
        parent = self._directory(path[:-1])
        found = None if parent is None else self._fs.lookup(parent, os.fsencode(path[-1]))
        if found is None:
            return None
        if found[1] != stat.S_IFDIR:
            raise ImportFailed(f"{'/'.join(path)!r} is no directory but a link or a file, and is gone through as one")
        self._directories[path] = found[0]
        return found[0]

    def _inside(self, path: Path) -> int:
        """The directory that holds ``path``."""
        inode = self._directory(path[:-1])
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such directory", "/".join(path[:-1]))
        return inode

    def _found(self, path: Path) -> tuple[int, int] | None:
        if path in self._directories:
            return self._directories[path], stat.S_IFDIR
        parent = self._directory(path[:-1])
        return None if parent is None else self._fs.lookup(parent, os.fsencode(path[-1]))

    def kind(self, path: Path) -> int | None:
        found = self._found(path)
        return None if found is None else found[1]

    def names(self, path: Path) -> list[str]:
        return [os.fsdecode(name) for name, _, _ in self._fs.entries(self._inside((*path, "")))]

    def make_directory(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        self._directories[path] = self._fs.make(self._inside(path), os.fsencode(path[-1]), attributes, xattrs=xattrs)

    def set_directory(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        self._fs.set_attributes(self._inside((*path, "")), attributes, xattrs)

    def make_file(self, path: Path, attributes: Attributes, xattrs: Xattrs, size: int, pieces: Pieces) -> None:
        inode, end = self._fs.make(self._inside(path), os.fsencode(path[-1]), attributes), 0
        for offset, data in pieces:
            self._fs.write(inode, data, offset, size=size)
            end = offset + len(data)
        if end != size:
            self._fs.truncate(inode, size)
        if xattrs:  # after the data, when its blocks have been counted
            self._fs.set_attributes(inode, attributes, xattrs)

    def make_symlink(self, path: Path, attributes: Attributes, xattrs: Xattrs, target: str) -> None:
        self._fs.make(self._inside(path), os.fsencode(path[-1]), attributes, target=os.fsencode(target), xattrs=xattrs)

    def make_node(self, path: Path, attributes: Attributes, xattrs: Xattrs) -> None:
        self._fs.make(self._inside(path), os.fsencode(path[-1]), attributes, xattrs=xattrs)

    def link(self, path: Path, target: Path) -> None:
        found = self._found(target)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", "/".join(target))
        self._fs.link(self._inside(path), os.fsencode(path[-1]), found[0])

    def remove(self, path: Path) -> None:
        found, parent, name = self._found(path), self._inside(path), os.fsencode(path[-1])
        if found is not None and found[1] == stat.S_IFDIR:
            self._directories = {known: inode for known, inode in self._directories.items() if known[: len(path)] != path}
            self._empty(found[0])
        self._fs.unlink(parent, name)

    def _empty(self, directory: int) -> None:
        """Without recursion: a tree may be deeper than Python's stack."""
        waiting = [(directory, 0, b"")]
        while waiting:
            inode, parent, name = waiting.pop()
            below = self._fs.entries(inode)
            if parent and not below:
                self._fs.unlink(parent, name)
                continue
            if parent:
                waiting.append((inode, parent, name))
            for entry, child, kind in below:
                if kind == stat.S_IFDIR:
                    waiting.append((child, inode, entry))
                else:
                    self._fs.unlink(inode, entry)

    def finish(self) -> None:
        """Everything is where it belongs already."""
