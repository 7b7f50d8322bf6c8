"""File systems for snapshots: the empty one that all without a parent begin with, and others' brought to the size asked for.

There is one base per type and size, ``containerd-base/TYPE/BYTES``: a clone of the pool's empty file system
(thinpool.filesystems.blank) without ``lost+found``, which containerd would take for a directory of the image.
"""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..api import LayerAPI, PoolAPI
from ..catalog import PARTIAL_LABEL
from ..errors import BadSize, LayerExists, LayerNotFound, ToolFailed
from ..filesystems.blank import BLANK_LABEL, FILESYSTEM_LABEL, blank_layer, grow_ext4, grow_xfs, run_tool

if TYPE_CHECKING:
    from ..pool import Pool


def base_layer(pool: PoolAPI, filesystem: str, size: int) -> LayerAPI:
    """The sealed layer that snapshots without a parent are cloned from; made when it is first asked for.

    Raises BadSize, NeedsRoot, ToolFailed.
    """
    name = f"containerd-base/{filesystem}/{size}"
    try:
        return pool.layer(name)
    except LayerNotFound:
        pass
    blank: LayerAPI = blank_layer(cast("Pool", pool), filesystem, size)  # which does with the interface
    labels = {BLANK_LABEL: "1", FILESYSTEM_LABEL: filesystem}
    layer = blank.clone(f"containerd-base/new/{uuid.uuid4().hex}", labels={**labels, PARTIAL_LABEL: "1"})
    try:
        if filesystem == "ext4":
            device = layer.attach().device
            try:
                run_tool(["debugfs", "-w", "-R", "rmdir lost+found", device])
            finally:
                layer.detach()
        layer.seal()
        layer.rename(name, labels=labels)
    except LayerExists:  # somebody else was quicker
        layer.delete()
        return pool.layer(name)
    except BaseException:
        layer.delete()
        raise
    return layer


def fit_filesystem(layer: LayerAPI, filesystem: str, size: int) -> None:
    """Brings a clone, and its file system, to a size in bytes. Raises BadSize where it cannot be as small, ToolFailed."""
    before = layer.size
    if size > before:
        layer.resize(size)
        if filesystem == "ext4":
            grow_ext4(layer)
        else:
            _grow_xfs(layer)
    elif size < before:
        if filesystem != "ext4":
            raise BadSize(f"an {filesystem} file system of {before} bytes cannot shrink to {size}")
        _shrink_ext4(layer, size)
        layer.resize(size, allow_shrink=True)


def _grow_xfs(layer: LayerAPI) -> None:
    with tempfile.TemporaryDirectory(prefix="thinpool-grow-") as directory:
        layer.mount(directory)
        try:
            grow_xfs(Path(directory))
        finally:
            layer.unmount()


def _shrink_ext4(layer: LayerAPI, size: int) -> None:
    """Offline, and forced as in :func:`grow_ext4`."""
    device = layer.attach().device
    try:
        run_tool(["resize2fs", "-f", device, f"{size >> 10}K"])
    except ToolFailed as error:
        raise BadSize(f"the file system cannot shrink to {size} bytes: {error}") from None
    finally:
        layer.detach()
