"""The FUSE tree: a directory with one live file per layer, served by threads of the C core.

Mounted at ``run/layers`` in the pool's directory for root and nobody else. Names are the layers', with ``/`` as
``%2F``. Python is asked only for names; data never passes through it.

The process that serves the tree must not wait for it while it holds the GIL, or the answer may never come. Calls of
:mod:`os` and through cffi and ctypes all let go of it. Nor must it wait for a *name* in the tree while it holds the pool's
lock; an open file (:meth:`LayerTree.open`) and the engine's own figures need no lock.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..engine import _core, _ffi
from ..errors import LayerNotFound, NeedsRoot, ToolFailed
from .keeping.takedown import MNT_DETACH, MNT_FORCE, TREE_TYPE, attempt, mount, umount

if TYPE_CHECKING:
    from ..engine import Engine
    from ..pool import Pool

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1024  # include/uapi/linux/mount.h
_FUSE_DEV_IOC_CLONE = 0x8004E500  # include/uapi/linux/fuse.h
# Each sleeps in the kernel until there is work, or waits for the host's disk; more would only cost memory.
_THREADS = min(max(4 * (os.cpu_count() or 1), 4), 16)

NEEDS_ROOT = (
    "block devices and mounts need root: the kernel asks for it. Without root, layers can be made, snapshotted, read, written (pread, pwrite, open), "
    "imported, exported with export_raw, and served by `thinpool serve`"
)


def file_name(layer_name: str) -> str:
    """A layer's file in the tree."""
    return layer_name.replace("/", "%2F")


class LayerTree:
    """The mounted tree of one pool."""

    def __init__(self, pool: Pool, descriptors: Sequence[int] = (), *, on_mounted: Callable[[Sequence[int]], None] | None = None) -> None:
        """Mounts and serves it; or goes on serving it over the descriptors of its connection, which another process has served before.

        ``on_mounted`` gets them before any request is answered. Raises NeedsRoot, and ToolFailed where the kernel has no FUSE.
        """
        # Nothing here may look at the tree itself: as long as nobody serves it, that would wait for ever.
        self.path = os.path.join(os.path.realpath(pool.path / "run"), "layers")
        self._descriptors = list(descriptors)
        try:
            if not descriptors:
                self._mount(pool.path)
                if on_mounted is not None:
                    on_mounted(self._descriptors)
            self._server = FuseServer(pool, self._descriptors, resume=bool(descriptors))
        except BaseException:
            self._close_descriptors()
            raise

    def _mount(self, pool_path: Path) -> None:
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        try:
            self._descriptors.append(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise ToolFailed(f"no FUSE here (/dev/fuse: {error.strerror}): modprobe fuse, or give the container the device") from error
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME
        options = f"fd={self._descriptors[0]},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
        try:
            mount(str(pool_path), self.path, TREE_TYPE, flags, options)
        except PermissionError as error:
            raise NeedsRoot(NEEDS_ROOT) from error
        except OSError as error:
            raise ToolFailed(f"cannot mount the layers' files on {self.path}: {error.strerror}") from error
        while len(self._descriptors) < _THREADS:  # a queue of the connection for each thread
            clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            self._descriptors.append(clone)
            fcntl.ioctl(clone, _FUSE_DEV_IOC_CLONE, struct.pack("I", self._descriptors[0]))

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def file(self, layer_name: str) -> str:
        """The path of a layer's file."""
        return os.path.join(self.path, file_name(layer_name))

    def resized(self, layer_id: int) -> None:
        """Lets the kernel forget the size that a layer's file had."""
        self._server.resized(layer_id)

    def close(self) -> None:
        """Unmounts the tree. Who still has a file of it open gets errors from now on."""
        if not attempt(umount, self.path, MNT_FORCE):
            attempt(umount, self.path, MNT_DETACH)
        self._server.stop()
        self._close_descriptors()


class FuseServer:
    """The threads that serve the tree on a connection to the kernel (csrc/fuse.c)."""

    def __init__(self, pool: Pool, descriptors: Sequence[int], *, resume: bool = False) -> None:
        """``descriptors``: ``/dev/fuse``, mounted, and its clones, open until :meth:`stop` has returned; ``resume``: another process has served them.

        Raises what the engine raises.
        """
        engine: Engine = pool.engine
        self._names = _Names(pool)
        self._handle = _ffi.new_handle(self._names)
        callbacks = _ffi.new("tp_fuse_callbacks *", {"ctx": self._handle, "lookup": _core.tp_py_fuse_lookup, "list": _core.tp_py_fuse_list})
        out = _ffi.new("tp_fuse **")
        engine.check(_core.tp_fuse_start(engine.pointer, list(descriptors), len(descriptors), resume, callbacks, out))
        self._pointer = out[0]

    def resized(self, layer_id: int) -> None:
        _core.tp_fuse_resized(self._pointer, layer_id)

    def stop(self) -> None:
        """Waits for the threads, which end with the connection."""
        _core.tp_fuse_stop(self._pointer)


class _Names:
    """What the C side asks: the layers' names and ids."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def find(self, name: str) -> int:
        layer_name = name.replace("%2F", "/")
        if file_name(layer_name) != name:
            raise LayerNotFound(f"no layer has the file name {name!r}")
        return self._pool.layer(layer_name).id

    def from_id(self, first: int) -> list[tuple[int, str]]:
        return [(layer_id, file_name(name)) for layer_id, name in self._pool.names() if layer_id >= first]


def _answer(work: Callable[[], None]) -> int:
    try:
        work()
    except LayerNotFound:
        return int(_core.TP_ENOENT)
    except Exception:
        return int(_core.TP_ECALLBACK)
    return 0


@_ffi.def_extern(error=_core.TP_ECALLBACK)  # type: ignore[untyped-decorator]
def tp_py_fuse_lookup(ctx: Any, name: Any, layer_id: Any) -> int:
    def find() -> None:
        layer_id[0] = cast(_Names, _ffi.from_handle(ctx)).find(_ffi.string(name).decode(errors="replace"))

    return _answer(find)


@_ffi.def_extern(error=_core.TP_ECALLBACK)  # type: ignore[untyped-decorator]
def tp_py_fuse_list(ctx: Any, first: int, out: Any) -> int:
    def add() -> None:
        for layer_id, name in cast(_Names, _ffi.from_handle(ctx)).from_id(first):
            if not _core.tp_fuse_list(out, layer_id, name.encode()):
                break

    return _answer(add)
