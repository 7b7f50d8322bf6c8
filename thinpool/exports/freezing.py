"""A snapshot of a layer whose file system is whole, also while it is mounted and written to.

A mounted ext4 has its latest changes in its journal. Freezing it (FIFREEZE, linux/fs.h) writes everything to
its place and holds writers up; the snapshot is O(1), and then they go on.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..api import LayerAPI, PoolAPI
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
    with frozen(pool, layer, mountpoint):
        snapshot = layer.snapshot(name, labels={PARTIAL_LABEL: "1"})
    try:
        yield snapshot
    finally:
        snapshot.delete()


def thaw(pool: PoolAPI, layer: LayerAPI, mountpoint: str) -> None:
    """Ends what a process that was killed in the midst of :func:`frozen` began."""
    mark = _mark(pool, layer)
    if mark.exists():
        with _opened(mountpoint) as fd, suppress(OSError):  # it may not have come to freezing it
            fcntl.ioctl(fd, _FITHAW, 0)
        mark.unlink()


def _mark(pool: PoolAPI, layer: LayerAPI) -> Path:
    """A file that says that we have frozen it: the kernel keeps it frozen, whoever dies."""
    return pool.path / "run" / f"frozen-{layer.id}"


@contextmanager
def _opened(mountpoint: str) -> Iterator[int]:
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def frozen(pool: PoolAPI, layer: LayerAPI, mountpoint: str | None) -> Iterator[None]:
    """Holds up those who write to a layer's file system, with all that they have written in its place. ``None``: it is not mounted.

    Raises ToolFailed.
    """
    if mountpoint is None:
        yield
        return
    mark = _mark(pool, layer)
    with _opened(mountpoint) as fd:
        mark.touch()
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
            mark.unlink()
