"""What a container changed in its file system, path by path, guided by the block diff: see :mod:`.changedinodes`.

Directories of both are walked side by side. Paths to the same inode are the same unless that is a suspect; what is left is compared: attributes,
extended attributes, then content. Of the base, only directories that changed are read; others have in both the same in them.

As ``docker diff`` does it: a directory counts as changed if something in it did, at whatever depth; of one that was deleted only itself is
told; a renamed one is deleted and added. ``lost+found`` is the file system's own, and left out.

Names of one file (hard links) come all or none: if one was added or changed, the others count as changed, so that a layer tar can
say it all without naming files of the layers below, which not every tool takes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..api import Extent
from .changedinodes import Ranges, changed_inodes
from .tree import Path

if TYPE_CHECKING:
    from .ext4 import Ext4

_ROOT = 2
_PIECE = 1 << 20
_LOST_AND_FOUND = b"lost+found"
_Entries = dict[bytes, tuple[int, int]]  # name: inode, kind


@dataclass(frozen=True, slots=True, order=True)
class PathChange:
    """A path added (``A``), changed (``C``) or deleted (``D``), and its inode now (0: deleted). ``()`` is the root, told only where it itself changed."""

    path: Path
    kind: Literal["A", "C", "D"]
    inode: int = 0


def changes(base: Ext4, layer: Ext4, changed_blocks: Iterable[Extent]) -> list[PathChange]:
    """What differs in ``layer``, a descendant of ``base``; sorted, so that a directory comes before what is in it.

    ``changed_blocks``: from :meth:`~thinpool.pool.Pool.diff` of the two layers.
    """
    return _Comparison(base, layer, ((extent.offset, extent.length) for extent in changed_blocks)).run()


class _Comparison:
    def __init__(self, base: Ext4, layer: Ext4, changed_blocks: Iterable[tuple[int, int]]) -> None:
        self._base, self._layer = base, layer
        self._found: dict[Path, PathChange] = {}
        self._directories: dict[int, tuple[Path, _Entries]] = {}  # of the layer, by inode
        self._walk()
        named = {_ROOT, *(inode for _, entries in self._directories.values() for inode, _ in entries.values())}
        self._suspects = changed_inodes(base, layer, changed_blocks, named)

    def run(self) -> list[PathChange]:
        if _ROOT in self._suspects and self._differ(_ROOT, _ROOT, stat.S_IFDIR):
            self._note("C", (), _ROOT)
        pending: list[tuple[Path, int, int]] = [((), _ROOT, _ROOT)]
        while pending:
            path, old, new = pending.pop()
            pending += self._compare_directories(path, old, new)
        self._add_other_names()
        self._add_parents()
        return sorted(self._found.values())

    def _note(self, kind: Literal["A", "C", "D"], path: Path, inode: int = 0) -> None:
        self._found.setdefault(path, PathChange(path, kind, inode))

    # --- directories ---

    def _walk(self) -> None:
        pending: list[tuple[Path, int]] = [((), _ROOT)]
        while pending:
            path, inode = pending.pop()
            entries = _entries(self._layer, inode)
            if not path:
                entries.pop(_LOST_AND_FOUND, None)
            self._directories[inode] = path, entries
            pending += [((*path, os.fsdecode(name)), child) for name, (child, kind) in entries.items() if kind == stat.S_IFDIR]

    def _entries_of_base(self, inode: int) -> _Entries:
        if inode in self._directories and inode not in self._suspects:
            return self._directories[inode][1]
        entries = _entries(self._base, inode)
        if inode == _ROOT:
            entries.pop(_LOST_AND_FOUND, None)
        return entries

    def _compare_directories(self, path: Path, old_inode: int, new_inode: int) -> list[tuple[Path, int, int]]:
        """The directories in it that both have."""
        below = []
        old_entries, new_entries = self._entries_of_base(old_inode), self._directories[new_inode][1]
        if old_entries is not new_entries:
            for name in old_entries.keys() - new_entries.keys():
                self._note("D", (*path, os.fsdecode(name)))
        for name, (new, kind) in new_entries.items():
            if name not in old_entries:
                self._add((*path, os.fsdecode(name)), new, kind, "A")
                continue
            old, old_kind = old_entries[name]
            if old == new and kind != stat.S_IFDIR and new not in self._suspects:
                continue
            child = (*path, os.fsdecode(name))
            if kind != old_kind:
                self._add(child, new, kind, "C")
                continue
            if (old != new or new in self._suspects) and self._differ(old, new, kind):
                self._note("C", child, new)
            if kind == stat.S_IFDIR:
                below.append((child, old, new))
        return below

    def _add(self, path: Path, inode: int, kind: int, how: Literal["A", "C"]) -> None:
        """With all that is in it."""
        self._note(how, path, inode)
        pending = [(path, inode)] if kind == stat.S_IFDIR else []
        while pending:
            path, inode = pending.pop()
            for name, (child, child_kind) in self._directories[inode][1].items():
                self._note("A", (*path, os.fsdecode(name)), child)
                if child_kind == stat.S_IFDIR:
                    pending.append(((*path, os.fsdecode(name)), child))

    # --- inodes ---

    def _differ(self, old_inode: int, new_inode: int, kind: int) -> bool:
        old, new = self._base.attributes(old_inode), self._layer.attributes(new_inode)
        if (old.mode, old.uid, old.gid, old.mtime_ns, old.rdev) != (new.mode, new.uid, new.gid, new.mtime_ns, new.rdev):
            return True
        if kind != stat.S_IFDIR:
            if old.size != new.size or (old_inode != new_inode and (old.links > 1 or new.links > 1)):
                return True
            if kind == stat.S_IFLNK and self._base.readlink(old_inode) != self._layer.readlink(new_inode):
                return True
            if kind == stat.S_IFREG and self._contents_differ(old_inode, new_inode):
                return True
        return self._base.xattrs(old_inode) != self._layer.xattrs(new_inode)

    def _contents_differ(self, old: int, new: int) -> bool:
        """Of two files of one size."""
        for offset, length in Ranges([*self._base.extents(old), *self._layer.extents(new)]).all:
            for piece in range(offset, offset + length, _PIECE):
                wanted = min(_PIECE, offset + length - piece)
                if self._base.read(old, wanted, piece) != self._layer.read(new, wanted, piece):
                    return True
        return False

    # --- what else a layer tar has to say ---

    def _add_other_names(self) -> None:
        changed = {change.inode for change in self._found.values() if change.inode and change.inode not in self._directories}
        linked = {inode for inode in changed if self._layer.attributes(inode).links > 1}
        if linked:
            for path, entries in self._directories.values():
                for name, (inode, _) in entries.items():
                    if inode in linked:
                        self._note("C", (*path, os.fsdecode(name)), inode)

    def _add_parents(self) -> None:
        inodes = {path: inode for inode, (path, _) in self._directories.items()}
        for path in list(self._found):
            for depth in range(len(path) - 1, 0, -1):
                if path[:depth] in self._found:
                    break
                self._note("C", path[:depth], inodes[path[:depth]])


def _entries(filesystem: Ext4, directory: int) -> _Entries:
    return {name: (inode, kind) for name, inode, kind in filesystem.entries(directory)}
