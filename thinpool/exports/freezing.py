"""A snapshot of a layer whose file system is whole, also while it is mounted and written to.

A mounted ext4 has its latest changes in its journal. Freezing it (FIFREEZE, linux/fs.h) writes everything to
its place and holds writers up; the snapshot is O(1), and then they go on.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..catalog import PARTIAL_LABEL
from ..errors import ToolFailed

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


@contextmanager
def frozen_snapshot(pool: Pool, layer: Layer) -> Iterator[Layer]:
    """A sealed layer with a layer's content of now, for as long as this is entered. Raises ToolFailed where it cannot be frozen."""
    mountpoint = next((one.mountpoint for one in pool.attachments() if one.layer == layer.name and one.mountpoint), None)
    name = f"thinpool/frozen/{uuid.uuid4().hex}"
    with _frozen(mountpoint):
        snapshot = layer.snapshot(name, labels={PARTIAL_LABEL: "1"})
    try:
        yield snapshot
    finally:
        snapshot.delete()


@contextmanager
def _frozen(mountpoint: str | None) -> Iterator[None]:
    if mountpoint is None:
        yield
        return
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.ioctl(fd, _FIFREEZE, 0)
        except OSError as error:
            raise ToolFailed(f"the file system on {mountpoint} cannot be frozen: {error.strerror}") from error
        try:
            yield
        finally:
            fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os.close(fd)
