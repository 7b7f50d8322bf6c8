"""Everything that a layer tar means, said to a :class:`~thinpool.filesystems.tree.FileTree`.

The OCI image specification's "Image Layer Filesystem Changeset", which is AUFS's: besides its members, a layer says what it hides of the
layers below. ``.wh.NAME`` hides NAME; ``.wh..wh..opq`` everything in its directory. Neither hides what the same layer brings, wherever in
the tar it stands. Other names that begin with ``.wh..wh.`` are AUFS's own bookkeeping, and mean nothing.

Names come from outside. ``/`` and ``./`` in front mean nothing; ``..`` is refused, and so is a way through a symbolic link, or a file: of
members, of whiteouts, and of what hard links name. What symbolic links themselves say is theirs.

What the layer has brought so far is kept as a tree of dictionaries: a directory, also one that is only passed, is a dictionary of what the layer
has brought in it, and anything else is ``None``. A directory that is in there is known to be one, so each is looked at once.
"""

from __future__ import annotations

import stat
import tarfile
from typing import Any, cast

from ..errors import NO_SPACE_ERRNOS, ImportFailed, OutOfSpace, ThinpoolError
from .compression import Readable
from .tarstream import Member, TarStream
from .tree import Attributes, FileTree, Path

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_BOOKKEEPING = ".wh..wh."
_NAME_BYTES_MAX = 255
_UNKNOWN = object()
_Brought = dict[str, Any]  # of dictionaries and None


def apply_layer(stream: Readable, tree: FileTree, *, whiteouts: bool) -> None:
    """Applies an uncompressed tar to a tree, and reads the stream to its end. ``whiteouts``: it is a layer, whose digest the
    caller checks; else ``.wh.`` names are ordinary ones.

    Raises :class:`~thinpool.errors.ImportFailed`, naming the member, for a tar that is damaged, cut short, or would write outside
    the tree, and OutOfSpace. What was applied until then stays.
    """
    layer = _Layer(tree, TarStream(stream, needs_end=not whiteouts), whiteouts)
    try:
        layer.apply()
    except (ImportFailed, tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError) as error:
        # of numbers out of range, sparse maps that end early, headers within headers
        if isinstance(error, ThinpoolError):
            raise
        raise ImportFailed(f"the tar is damaged at {layer.member}: {error}") from error
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise OutOfSpace(f"no room for {layer.member}: give the layer a larger size, or the pool more capacity") from error
        if isinstance(error, ThinpoolError):
            raise
        raise ImportFailed(f"cannot unpack {layer.member}: {error.strerror or error}") from error


def _path(name: str) -> Path:
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    for part in parts:
        if part == "..":
            raise ImportFailed(f"{name!r} climbs out of the root file system")
        if "\0" in part or len(part.encode("utf-8", "surrogateescape")) > _NAME_BYTES_MAX:
            raise ImportFailed(f"{name[:300]!r} is not the name of a file")
    return parts


class _Layer:
    """A layer that is being applied."""

    def __init__(self, tree: FileTree, tar: TarStream, whiteouts: bool) -> None:
        self.member = "its start"
        self._tree, self._tar, self._whiteouts = tree, tar, whiteouts
        self._brought: _Brought = {}

    def apply(self) -> None:
        for member in self._tar:
            self.member = member.name
            path = _path(member.name)
            if not self._whiteouts or not self._hidden_by(path):
                self._add(member, path)
            self.member = "its end"
        self._tree.finish()

    # --- what it hides ---

    def _hidden_by(self, path: Path) -> bool:
        """Whether the member's name means something to the layers below, which then is done."""
        if not path:
            return False
        parent, name = path[:-1], path[-1]
        if any(part.startswith(_BOOKKEEPING) for part in parent):
            return True
        if not name.startswith(_WHITEOUT):
            return False
        if name == _OPAQUE:
            if self._kind_of_parent(path) is not None:
                self._hide_below(parent)
        elif not name.startswith(_BOOKKEEPING):
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in ("", ".", ".."):
                raise ImportFailed(f"{'/'.join(path)!r} hides nothing that can be")
            self._hide((*parent, hidden))
        return True

    def _kind_of_parent(self, path: Path) -> int | None:
        kind = self._tree.kind(path[:-1])
        if kind not in (None, stat.S_IFDIR):
            raise ImportFailed(f"{'/'.join(path)!r} leads through {path[-2]!r}, which is no directory but a link or a file")
        return kind

    def _hide(self, path: Path) -> None:
        if self._tree.kind(path) is None:
            return
        brought = self._find(path)
        if brought is _UNKNOWN:
            self._tree.remove(path)
        elif brought is not None:
            self._hide_below(path)

    def _hide_below(self, path: Path) -> None:
        for name in self._tree.names(path):
            self._hide((*path, name))

    # --- what it brings ---

    def _find(self, path: Path) -> Any:
        """What the layer has brought there; ``_UNKNOWN``: nothing."""
        found: Any = self._brought
        for name in path:
            found = found.get(name, _UNKNOWN) if isinstance(found, dict) else _UNKNOWN
        return found

    def _enter(self, path: Path, mtime_ns: int) -> _Brought:
        """What the layer has brought into the directory that holds ``path``; those that are missing on the way are made."""
        found = self._brought
        for depth, name in enumerate(path[:-1], 1):
            below = found.get(name, _UNKNOWN)
            if below is _UNKNOWN:
                directory = path[:depth]
                kind = self._tree.kind(directory)
                if kind is None:
                    self._tree.make_directory(directory, Attributes(mode=stat.S_IFDIR | 0o755, uid=0, gid=0, mtime_ns=mtime_ns), {})
                below = found[name] = {} if kind in (None, stat.S_IFDIR) else None
            if below is None:
                raise ImportFailed(f"{'/'.join(path)!r} leads through {name!r}, which is no directory but a link or a file")
            found = cast(_Brought, below)
        return found

    def _add(self, member: Member, path: Path) -> None:
        kind, attributes = member.kind, member.attributes()
        if not path:
            if kind != stat.S_IFDIR:
                raise ImportFailed(f"{member.name!r} would replace the root directory")
            self._tree.set_directory((), attributes, member.xattrs())
            return
        siblings, name = self._enter(path, attributes.mtime_ns), path[-1]
        if kind is None:
            target = self._target(member, path)
            if target == path:
                return
            self._clear(path, siblings)
            self._tree.link(path, target)
        elif kind == stat.S_IFDIR:
            if self._tree.kind(path) == stat.S_IFDIR:
                self._tree.set_directory(path, attributes, member.xattrs())
            else:
                self._clear(path, siblings)
                self._tree.make_directory(path, attributes, member.xattrs())
            siblings.setdefault(name, {})
            return
        else:
            self._clear(path, siblings)
            self._make(member, path, attributes)
        siblings[name] = None

    def _make(self, member: Member, path: Path, attributes: Attributes) -> None:
        xattrs = member.xattrs()
        if stat.S_ISREG(attributes.mode):
            self._tree.make_file(path, attributes, xattrs, member.size, self._tar.pieces(member))
        elif stat.S_ISLNK(attributes.mode):
            if not member.linkname or "\0" in member.linkname:
                raise ImportFailed(f"{member.name!r} is a symbolic link to nothing that can be")
            self._tree.make_symlink(path, attributes, xattrs, member.linkname)
        else:
            self._tree.make_node(path, attributes, xattrs)

    def _clear(self, path: Path, siblings: _Brought) -> None:
        """A member takes the place of what is there."""
        kind = self._tree.kind(path)
        if kind is None:
            return
        if kind == stat.S_IFDIR and not self._whiteouts and self._tree.names(path):
            raise ImportFailed(f"{'/'.join(path)!r} would replace a directory that is not empty")
        self._tree.remove(path)
        siblings.pop(path[-1], None)

    def _target(self, member: Member, path: Path) -> Path:
        """What a hard link names."""
        target = _path(member.linkname)
        if target[: len(path)] == path and target != path:
            raise ImportFailed(f"{member.name!r} is a hard link to {member.linkname!r}, which it would replace")
        kind = self._tree.kind(target) if target else stat.S_IFDIR
        if kind is None:
            raise ImportFailed(f"{member.name!r} is a hard link to {member.linkname!r}, which is not there")
        if kind == stat.S_IFDIR:
            raise ImportFailed(f"{member.name!r} is a hard link to {member.linkname!r}, which is a directory")
        return target
