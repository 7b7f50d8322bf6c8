"""The device mapper by its ioctls (linux/dm-ioctl.h), for tests in a guest: there each run of ``dmsetup`` takes a fifth of a second."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_HEAD = struct.Struct("=3I 2I I i 3I Q 128s 136s")  # version, data_size, data_start, target_count, open_count, flags, event, padding, dev, name, uuid
_TARGET = struct.Struct("=2Q i I 16s")  # first sector, sectors, status, next, type
_CREATE, _REMOVE, _SUSPEND, _LOAD, _MESSAGE = 3, 4, 6, 9, 14
_SUSPENDED = 2
_READ_AND_WRITE, _TYPE = 3, 0xFD


def create(name: str, sectors: int, kind: str, parameters: str) -> Path:
    """A device of one target, resumed."""
    number = _call(_CREATE, name)
    _call(_LOAD, name, _TARGET.pack(0, sectors, 0, 0, kind.encode()) + parameters.encode() + b"\0", targets=1)
    resume(name)
    return Path(f"/dev/dm-{os.minor(number)}")


def remove(name: str) -> None:
    _call(_REMOVE, name)


def suspend(name: str) -> None:
    _call(_SUSPEND, name, flags=_SUSPENDED)


def resume(name: str) -> None:
    _call(_SUSPEND, name)


def message(name: str, text: str) -> None:
    """To the target at the first sector."""
    _call(_MESSAGE, name, bytes(8) + text.encode() + b"\0")


def _call(command: int, name: str, data: bytes = b"", *, targets: int = 0, flags: int = 0) -> int:
    """Returns the device's number."""
    size = _HEAD.size + (len(data) + 7) // 8 * 8
    head = _HEAD.pack(4, 0, 0, size, _HEAD.size, targets, 0, flags, 0, 0, 0, name.encode(), b"")
    buffer = bytearray((head + data).ljust(size, b"\0"))
    with open("/dev/mapper/control", "r+b", buffering=0) as control:
        fcntl.ioctl(control, _READ_AND_WRITE << 30 | _HEAD.size << 16 | _TYPE << 8 | command, buffer)
    number: int = _HEAD.unpack_from(buffer)[10]
    return number
