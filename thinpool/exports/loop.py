"""Loop devices: a block device of the kernel on a layer's file in the FUSE tree.

With direct I/O the device's requests go to the file as they are, many at once, and nothing is cached twice; a discard
becomes a punch. Through the ioctls of include/uapi/linux/loop.h, see loop(4).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LayerBusy, ToolFailed
from .holders import describe, holders
from .keeping.takedown import device_number, device_path, devices, let_go

_SET_STATUS64, _GET_STATUS64, _SET_CAPACITY, _CONFIGURE, _GET_FREE = 0x4C04, 0x4C05, 0x4C07, 0x4C0A, 0x4C82
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_INFO = struct.Struct("<5Q4I64s64s32s2Q")  # struct loop_info64
_CONFIG = struct.Struct(f"<2I{_INFO.size}s64x")  # struct loop_config: fd, block_size, info, reserved
_FLAGS_FIELD = 8  # lo_flags, in _INFO
_PATIENCE_SECONDS = 3.0


@contextmanager
def _opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class LoopDevice:
    """A loop device on a file."""

    def __init__(self, file: str, sector_size: int = 512, read_only: bool = False, orphan: str | None = None) -> None:
        """``sector_size``: its logical block size in bytes; ``orphan``: the device, if it is there already.

        Raises :class:`~thinpool.errors.ToolFailed` where the kernel has no loop devices, or refuses; LayerBusy where an earlier one does not go.
        """
        self._file = os.open(file, os.O_PATH | os.O_CLOEXEC)  # to have its attributes looked at without asking for its name
        try:
            if orphan is None:
                _wait_for_earlier(file)
            self.path = orphan or _attach(file, sector_size, read_only)
        except BaseException:
            self.close()
            raise

    def resized(self) -> None:
        """Let the device take its file's new size."""
        os.fstat(self._file)  # devices of older kernels take the size that was last seen
        with _opened(self.path) as descriptor:
            fcntl.ioctl(descriptor, _SET_CAPACITY)

    def detach(self) -> None:
        """Take the file off the device, and wait until it is off.

        Raises :class:`~thinpool.errors.LayerBusy` naming who has the device open; it stays as it was then.
        """
        number = device_number(self.path)
        backing = devices().get(number)
        if backing is None:
            return
        deadline = time.monotonic() + _PATIENCE_SECONDS
        let_go(self.path)
        while devices().get(number) == backing:
            if time.monotonic() > deadline:
                _keep(self.path)
                users = holders(self.path)
                raise LayerBusy(f"{self.path} is in use{describe(users)}: end that first", users)
            time.sleep(0.01)

    def close(self) -> None:
        """Forget about the device, which was detached or taken down."""
        os.close(self._file)


def _wait_for_earlier(file: str) -> None:
    """Until no other device is on it. What a killed process was unmounting is in no mount table any more, and is still written through its device."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while others := [number for number, backing in devices().items() if backing == file]:
        if time.monotonic() > deadline:
            raise LayerBusy(f"{file} is still written to through {device_path(others[0])}: try again later")
        time.sleep(0.01)


def _attach(file: str, sector_size: int, read_only: bool) -> str:
    with _opened(file, os.O_RDONLY if read_only else os.O_RDWR) as backing:
        info = _INFO.pack(*(0,) * 8, _DIRECT_IO | (_READ_ONLY if read_only else 0), os.fsencode(file)[:63], b"", b"", 0, 0)
        config = _CONFIG.pack(backing, sector_size, info)
        for _ in range(100):
            device = _free_device()
            with _opened(device, os.O_RDONLY if read_only else os.O_RDWR) as descriptor:
                try:
                    fcntl.ioctl(descriptor, _CONFIGURE, config)
                    return device
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise ToolFailed(f"the kernel does not take {file} for {device}: {error.strerror}") from error
            # somebody else took that device first
    raise ToolFailed(f"no loop device for {file}: others keep taking them first; try again")


def _free_device() -> str:
    try:
        with _opened("/dev/loop-control", os.O_RDWR) as control:
            number = fcntl.ioctl(control, _GET_FREE)
    except OSError as error:
        raise ToolFailed(f"no loop devices here (/dev/loop-control: {error.strerror}): modprobe loop, or give the container its devices") from error
    device = f"/dev/loop{number}"
    if not os.path.exists(device):  # in a container /dev does not grow by itself
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(7, number))
    return device


def _keep(device: str) -> None:
    """Undo the mark of a detach that was not to be."""
    with _opened(device) as descriptor:
        fields = list(_INFO.unpack(fcntl.ioctl(descriptor, _GET_STATUS64, bytes(_INFO.size))))
        fields[_FLAGS_FIELD] &= ~_AUTOCLEAR
        fcntl.ioctl(descriptor, _SET_STATUS64, _INFO.pack(*fields))
