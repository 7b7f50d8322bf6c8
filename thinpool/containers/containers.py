"""The containers of a pool: :class:`Containers`, what :attr:`thinpool.Pool.containers` is.

A container is a clone of its image's top layer, under the container's name, and a document ``container/NAME``; both are in one commit. A
layer with the container's label and no document was made by an earlier version: it is listed, and can be removed and reset, all the same.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import Attachment, Change, Container, Image, Size
from ..errors import BadSize, ContainerNotFound, ImageNotFound, ImportFailed, LayerBusy, LayerNotFound, LayerState
from ..exports.freezing import frozen_snapshot
from ..filesystems.blank import FILESYSTEM_LABEL, grow_ext4, grow_mounted_ext4, grow_xfs
from ..filesystems.changes import changes
from ..filesystems.ext4 import Ext4
from ..filesystems.ext4tree import Ext4Tree
from ..filesystems.tree import Attributes, FileTree, MountedTree
from ..units import parse_size
from .bundle import bundle_directory, sweep
from .names import layer_stem

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

KEY = "container/"
CONTAINER_LABEL = "thinpool.container"
IMAGE_LABEL = "thinpool.image"
_PIECE_BYTES = 1 << 20
_LINKS_MAX = 40
_KILLED_SECONDS = 10.0


class Containers:
    """The containers of one pool; see :class:`thinpool.api.ContainersAPI`. All methods may be called from any thread."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    # --- making, finding, removing ---

    def create(
        self, image: str, *, name: str | None = None, size: Size | None = None, command: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> Container:
        """A container from an image, or from a plain layer. Takes no time and no space.

        ``size``: a larger one, to which its file system is grown (needs root); ``command``: what runs in it, if not what the image
        says. Raises ImageNotFound, LayerExists, BadName, BadSize, NeedsRoot.
        """
        found, layer = self._source(image)
        config = self._pool.images.inspect(found.id)["Config"] if found is not None else {}
        name = name or f"{layer_stem(image)}-{uuid.uuid4().hex[:8]}"
        size_bytes = layer.size if size is None else parse_size(size)
        if size_bytes < layer.size:
            raise BadSize(f"a container of {image} has at least its {layer.size} bytes, not {size}")
        record = {"image": image, "image_id": found.id if found else None, "created": time.time(), "command": list(command), "config": config}
        filesystem = layer.labels.get(FILESYSTEM_LABEL, "ext4")
        given = {**(labels or {}), CONTAINER_LABEL: "1", IMAGE_LABEL: image, FILESYSTEM_LABEL: filesystem}
        with self._pool.atomically():
            clone = layer.clone(name, size_bytes, labels=given)
            self._pool.put_document(KEY + name, json.dumps({**record, "layer_id": clone.id}).encode())
        try:
            if size_bytes > layer.size and filesystem == "ext4":
                grow_ext4(clone)
        except BaseException:
            self._delete(clone)
            raise
        return self.get(name)

    def _source(self, image: str) -> tuple[Image | None, Layer]:
        """The image and its top layer, or a plain layer."""
        try:
            found = self._pool.images.get(image)
        except ImageNotFound as error:
            try:
                return None, self._pool.layer(image)
            except LayerNotFound:
                raise error from None
        if not found.layers:
            raise LayerState(f"the image {image} has no layers: there is nothing to run")
        return found, self._pool.layer(found.layers[-1])

    def _layer(self, name: str) -> Layer:
        try:
            layer = self._pool.layer(name)
        except LayerNotFound:
            raise ContainerNotFound(f"no container named {name!r}") from None
        if CONTAINER_LABEL not in layer.labels:
            raise ContainerNotFound(f"{name!r} is a layer, but no container")
        return layer

    def configuration(self, name: str) -> dict[str, Any]:
        """The record as it is stored: image, image_id, created, command, and ``config``, the image's."""
        layer = self._layer(name)
        content = self._pool.document(KEY + name)
        if content is not None:
            record: dict[str, Any] = json.loads(content)
            return record
        image = layer.labels.get(IMAGE_LABEL, layer.origin or "")
        return {"image": image, "image_id": None, "created": layer.created, "command": [], "config": {}, "layer_id": layer.id}

    def get(self, name: str) -> Container:
        """The container of that name. Raises ContainerNotFound."""
        layer, record = self._layer(name), self.configuration(name)
        config = record["config"]
        command = record["command"] or [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]
        running = any(one.purpose == "run" for one in self._attachments(layer))
        return Container(name, record["image"], record["image_id"], name, record["created"], tuple(command), running, layer.usage())

    def list(self) -> Sequence[Container]:
        """All containers, oldest first."""
        return [self.get(layer.name) for layer in self._pool.layers(CONTAINER_LABEL)]

    def _attachments(self, layer: Layer) -> Sequence[Attachment]:
        return [one for one in self._pool.attachments() if one.layer == layer.name]

    def remove(self, name: str, *, force: bool = False) -> None:
        """Deletes a container. Raises LayerBusy while it is used; ``force`` kills what runs in it, and unmounts it."""
        layer = self._layer(name)
        if force:
            self._stop(layer)
        self._delete(layer)

    def _delete(self, layer: Layer) -> None:
        with self._pool.atomically():
            name = layer.name
            layer.delete()
            self._pool.put_document(KEY + name, None)

    def _stop(self, layer: Layer) -> None:
        deadline = time.monotonic() + _KILLED_SECONDS
        for one in self._attachments(layer):
            if one.purpose == "run" and one.owner:
                os.kill(one.owner, signal.SIGKILL)  # its processes die with it, and its mount is taken down
                while self._attachments(layer) and time.monotonic() < deadline:
                    time.sleep(0.02)
                sweep(bundle_directory(self._pool, str(one.mountpoint)))
            elif one.mountpoint is not None:
                layer.unmount()
            else:
                layer.detach()

    def reset(self, name: str) -> None:
        """Back to what its image is; O(1). Raises LayerBusy while it is used, LayerState where the image's layer is gone."""
        layer = self._layer(name)
        parent = layer.parent
        size = layer.size
        layer.reset()
        if parent is not None and size > parent.size and layer.labels.get(FILESYSTEM_LABEL, "ext4") == "ext4":
            layer.resize(size)
            grow_ext4(layer)

    def resize(self, name: str, size: Size) -> None:
        """Grows a container and its file system, also while it runs. Raises BadSize, NeedsRoot, ToolFailed."""
        layer = self._layer(name)
        if parse_size(size) < layer.size:
            raise BadSize(f"container {name} has {layer.size} bytes and can only grow, not to {size}")
        filesystem = layer.labels.get(FILESYSTEM_LABEL, "ext4")
        mounted = next((one for one in self._attachments(layer) if one.mountpoint), None)
        if mounted is None and filesystem != "ext4":
            raise LayerState(f"an {filesystem} file system grows while it is mounted: mount container {name} first")
        layer.resize(size)
        if mounted is None:
            grow_ext4(layer)
        elif filesystem == "ext4":
            grow_mounted_ext4(mounted.device)
        else:
            grow_xfs(Path(str(mounted.mountpoint)))

    # --- what is in it ---

    def diff(self, name: str) -> Sequence[Change]:
        """What it has changed in its image's files, by path; looks only at files on blocks that differ. No root, and also while it runs."""
        layer = self._layer(name)
        parent = layer.parent
        if parent is None:
            raise LayerState(f"what container {name} was made from was deleted: there is nothing to compare it with")
        with frozen_snapshot(self._pool, layer) as now, Ext4(parent) as below, Ext4(now) as above:
            found = changes(below, above, self._pool.diff(parent, now))
        return [Change(one.kind, "/" + "/".join(one.path)) for one in found if one.path]

    def copy_out(self, name: str, path: str, destination: str | Path) -> None:
        """Copies a file or directory out of a container, an image or a layer, as it is now; needs no root. Into ``destination`` if that is a
        directory, else under that name. Links inside are followed as if the container's root were ``/``."""
        try:
            layer = self._pool.layer(name)
        except LayerNotFound:
            layer = self._source(name)[1]
        with _opened(self._pool, layer) as files:
            inode = _resolve(files, path)
            target = Path(destination)
            if target.is_dir():
                target = target / (Path(path).name or name)
            _copy_out(files, inode, target)

    def copy_in(self, source: str | Path, name: str, path: str) -> None:
        """Copies a file or directory into a container: into ``path`` if that is a directory there, else under that name; owned by root. No
        root is needed while it is not mounted. A symbolic link on the way is refused."""
        layer, given = self._layer(name), Path(source)
        if not os.path.lexists(given):
            raise ImportFailed(f"cannot read {given}: no such file")
        parts = tuple(part for part in path.split("/") if part not in ("", "."))
        if ".." in parts:
            raise ImportFailed(f"{path!r} leads upwards: give the path from / on")
        mounted = next((one.mountpoint for one in self._attachments(layer) if one.mountpoint), None)
        if mounted is not None:
            with MountedTree(mounted) as tree:
                _copy_in(tree, given, parts)
        elif self._attachments(layer):
            raise LayerBusy(f"container {name} is attached as a block device: detach it first")
        else:
            with Ext4(layer, writable=True) as files:
                _copy_in(Ext4Tree(files), given, parts)


@contextmanager
def _opened(pool: Pool, layer: Layer) -> Iterator[Ext4]:
    if layer.sealed:
        with Ext4(layer) as files:
            yield files
    else:
        with frozen_snapshot(pool, layer) as now, Ext4(now) as files:
            yield files


def _resolve(files: Ext4, path: str) -> int:
    """The inode of a path, whose symbolic links are followed within the file system. Raises ImportFailed."""
    waiting, way, links = [part for part in path.split("/") if part not in ("", ".")][::-1], [Ext4.ROOT], 0
    while waiting:
        part = waiting.pop()
        if part == "..":
            way = way[:-1] or [Ext4.ROOT]
            continue
        try:
            found = files.lookup(way[-1], os.fsencode(part))
        except NotADirectoryError:
            found = None
        if found is None:
            raise ImportFailed(f"there is no {path!r} in layer {files.layer.name}")
        if found[1] != stat.S_IFLNK:
            way.append(found[0])
            continue
        links += 1
        if links > _LINKS_MAX:
            raise ImportFailed(f"{path!r} has too many symbolic links")
        target = os.fsdecode(files.readlink(found[0]))
        if target.startswith("/"):
            way = [Ext4.ROOT]
        waiting += [piece for piece in target.split("/") if piece not in ("", ".")][::-1]
    return way[-1]


def _copy_out(files: Ext4, inode: int, target: Path) -> None:
    attributes = files.attributes(inode)
    kind = stat.S_IFMT(attributes.mode)
    if kind == stat.S_IFDIR:
        target.mkdir(exist_ok=True)
        for name, child, _ in files.entries(inode):
            _copy_out(files, child, target / os.fsdecode(name))
    elif kind == stat.S_IFLNK:
        target.unlink(missing_ok=True)
        target.symlink_to(os.fsdecode(files.readlink(inode)))
        return
    elif kind == stat.S_IFREG:
        if target.is_symlink():
            target.unlink()
        with open(target, "wb") as file:
            for offset, length in files.extents(inode):
                for at in range(offset, offset + length, _PIECE_BYTES):
                    file.seek(at)
                    file.write(files.read(inode, min(_PIECE_BYTES, offset + length - at), at))
            file.truncate(attributes.size)
    else:
        return  # devices, fifos and sockets mean nothing outside
    os.chmod(target, stat.S_IMODE(attributes.mode) & 0o777)
    os.utime(target, ns=(attributes.mtime_ns, attributes.mtime_ns))


def _copy_in(tree: FileTree, source: Path, parts: tuple[str, ...]) -> None:
    if tree.kind(parts) == stat.S_IFDIR and not (source.is_dir() and not source.is_symlink() and not parts):
        parts = (*parts, source.resolve().name)
    if not parts or tree.kind(parts[:-1]) != stat.S_IFDIR:
        raise ImportFailed(f"there is no directory /{'/'.join(parts[:-1])} in the container")
    _put(tree, source, parts)
    tree.finish()


def _put(tree: FileTree, source: Path, path: tuple[str, ...]) -> None:
    status, there = source.lstat(), tree.kind(path)
    attributes = Attributes(mode=status.st_mode, uid=0, gid=0, mtime_ns=status.st_mtime_ns, size=status.st_size)
    is_directory = stat.S_ISDIR(status.st_mode)
    if there is not None and not (is_directory and there == stat.S_IFDIR):
        tree.remove(path)
        there = None
    if is_directory:
        if there is None:
            tree.make_directory(path, attributes, {})
        for child in sorted(source.iterdir()):
            _put(tree, child, (*path, child.name))
    elif stat.S_ISLNK(status.st_mode):
        tree.make_symlink(path, attributes, {}, os.readlink(source))
    elif stat.S_ISREG(status.st_mode):
        tree.make_file(path, attributes, {}, status.st_size, _pieces(source, status.st_size))
    else:
        raise ImportFailed(f"{source} is neither a file, a directory nor a symbolic link")


def _pieces(source: Path, size: int) -> Iterator[tuple[int, bytes]]:
    with source.open("rb") as file:
        done = 0
        while done < size and (data := file.read(min(_PIECE_BYTES, size - done))):
            yield done, data
            done += len(data)
