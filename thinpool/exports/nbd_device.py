"""nbd devices: a block device of the kernel whose other end is the pool's own NBD server (csrc/nbd.c), over a pair of sockets.

Made by netlink (include/uapi/linux/nbd-netlink.h): unlike the ioctls it needs no thread that waits in the kernel, takes a new size, and takes a new
connection in place of one whose server died. The path that the layer's file has in the FUSE tree, mounted or not, is what the device is known by
in the kernel ("backend"), as loop devices are known by their backing file: so keeping/takedown.py finds both.

There is one connection, and no time limit: where there are several, the kernel gives up those that are slow to answer.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import stat
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LayerBusy, ThinpoolError, ToolFailed
from .holders import describe, holders, times_open_here
from .keeping import netlink
from .keeping.takedown import NBD_INDEX, attempt, device_number, devices, let_go, nbd_index

if TYPE_CHECKING:
    from ..layer import Layer

_CONNECT, _RECONFIGURE = 1, 3
_SIZE, _BLOCK_SIZE, _FLAGS, _SOCKETS, _DEAD_SECONDS, _BACKEND = 2, 3, 5, 7, 8, 10
_SOCKET_ITEM = _SOCKET_FD = 1
_CAN, _READ_ONLY = 1 | 4 | 8 | 32 | 64, 2  # include/uapi/linux/nbd.h: has flags, FLUSH, FUA, TRIM, WRITE_ZEROES
_PR_SET_IO_FLUSHER = 57
_PATIENCE_SECONDS = 3.0
_DEAD_SECONDS_MAX = 600  # that requests wait for another server when theirs has died, before they fail
_RESEND_MS = 1000  # after so long the kernel looks whether one that is not answered went to a server that has died, and sends it to the next

_LOG = logging.getLogger("thinpool.nbd")


class NbdDevice:
    """An nbd device on a layer, and the thread that serves it."""

    def __init__(self, layer: Layer, file: str, sector_size: int = 512, orphan: str | None = None) -> None:
        """``file``: what it is known by; ``orphan``: the device, if it is there already and its server died.

        Raises :class:`~thinpool.errors.ToolFailed` where the kernel has no nbd devices, or refuses.
        """
        self._layer, self._file = layer, file
        if orphan is None:
            self.path, self._connection = self._make(sector_size)
        else:
            self.path, self._connection = orphan, self._go_on(orphan)
        self._thread = threading.Thread(target=self._serve, name="thinpool-nbd-device", daemon=True)
        self._thread.start()

    def resized(self) -> None:
        """Let the device take its layer's new size."""
        self._ask(_RECONFIGURE, {NBD_INDEX: nbd_index(self.path), _SIZE: _u64(self._layer.size)})

    def detach(self) -> None:
        """Take the layer off the device. Raises :class:`~thinpool.errors.LayerBusy` naming who has it open; it stays as it was then."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._let_go_if_unused():
            if time.monotonic() > deadline:
                users = holders(self.path)
                raise LayerBusy(f"{self.path} is in use{describe(users)}: end that first", users)
            time.sleep(0.02)

    def close(self) -> None:
        """Serve it no more: it was detached, or taken down."""
        with self._connection:
            self._connection.shutdown(socket.SHUT_RDWR)
            self._thread.join()

    def _make(self, sector_size: int) -> tuple[str, socket.socket]:
        """A new device: its path, and our end of its connection."""
        flags = _CAN | (_READ_ONLY if self._layer.sealed else 0)
        wanted = {_SIZE: _u64(self._layer.size), _BLOCK_SIZE: _u64(sector_size), _FLAGS: _u64(flags), _DEAD_SECONDS: _u64(_DEAD_SECONDS_MAX)}
        answer, ours = self._connect(_CONNECT, wanted)
        (number,) = struct.unpack("=I", answer[NBD_INDEX])
        path, kernel = f"/dev/nbd{number}", Path(f"/sys/block/nbd{number}")
        try:
            if not os.path.exists(path):  # in a container /dev does not grow by itself
                major, minor = map(int, (kernel / "dev").read_text().split(":"))
                os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
            if devices().get(device_number(path)) != self._file:
                raise ToolFailed("nbd devices need Linux 5.14 or newer, which knows whose they are; attach via loop")
            attempt((kernel / "queue/io_timeout").write_text, str(_RESEND_MS))  # which a container may not; then it is 30 s
        except BaseException:
            let_go(path)
            ours.close()
            raise
        return path, ours

    def _go_on(self, orphan: str) -> socket.socket:
        """Our end of a new connection of a device. It takes none in the moment when the kernel has not seen yet that the old one died."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            _, ours = self._connect(_RECONFIGURE, {NBD_INDEX: nbd_index(orphan)})
            if _is_open(ours):
                return ours
            ours.close()
            if time.monotonic() > deadline:
                raise ToolFailed(f"another process serves {orphan}")
            time.sleep(0.02)

    def _connect(self, command: int, attributes: netlink.Attributes) -> tuple[netlink.Attributes, socket.socket]:
        """Gives the kernel one end of a new connection; its answer, and the other end."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                item = netlink.encode({_SOCKET_FD: struct.pack("=I", theirs.fileno())})
                return self._ask(command, {**attributes, _SOCKETS: netlink.encode({_SOCKET_ITEM: item})}), ours
        except BaseException:
            ours.close()
            raise

    def _ask(self, command: int, attributes: netlink.Attributes) -> netlink.Attributes:
        try:
            return netlink.ask("nbd", command, {**attributes, _BACKEND: os.fsencode(self._file) + b"\0"})
        except FileNotFoundError as error:
            raise ToolFailed("no nbd devices here, or not in this network namespace: modprobe nbd, or attach via loop") from error
        except OSError as error:
            raise ToolFailed(f"the kernel takes no nbd device for {self._file}: {error.strerror}") from error

    def _let_go_if_unused(self) -> bool:
        """The kernel would take it from whoever has it open, so one must look first; somebody who opens it just then gets errors."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:  # mounted, or part of another device
                return False
            raise
        try:
            if holders(self.path) or times_open_here(self.path) > 1:
                return False
            os.fsync(descriptor)
            let_go(self.path)
        finally:
            os.close(descriptor)
        return True

    def _serve(self) -> None:
        # As for FUSE (csrc/fuse.c): while memory is short, these threads must not wait for write-back that comes through them.
        ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
        try:
            self._layer.handle.serve_nbd(self._connection.fileno(), read_only=self._layer.sealed, structured=False, contexts=[])
        except ThinpoolError:
            _LOG.exception("a device is not served any more")


def _is_open(connection: socket.socket) -> bool:
    """Whether somebody has the other end."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True


def _u64(number: int) -> bytes:
    return struct.pack("=Q", number)
