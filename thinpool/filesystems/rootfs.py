"""A base layer from a root file system tarball."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..api import Progress, Size
from ..catalog import PARTIAL_LABEL
from ..errors import ImportFailed, NeedsRoot
from ..units import parse_size
from .blank import FILESYSTEM_LABEL, blank_layer
from .tarball import unpack
from .tree import MountedTree

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool


def import_rootfs(
    pool: Pool,
    path: Path,
    name: str,
    *,
    size: Size = "10G",
    filesystem: str = "ext4",
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Layer:
    """See :meth:`thinpool.Pool.import_rootfs`: a clone of the empty file system, filled, sealed, and only then named."""
    if os.geteuid() != 0:
        raise NeedsRoot("unpacking a root file system mounts it, which needs root; without root, make an image (mke2fs -d DIR) and import that")
    if not path.is_file():
        raise ImportFailed(f"cannot read {path}: {'it is not a file' if path.exists() else 'no such file'}")
    pool.require_free(name)  # before the work, not after it
    blank = blank_layer(pool, filesystem, parse_size(size))
    layer = blank.clone(f"thinpool/import/{uuid.uuid4().hex}", labels={PARTIAL_LABEL: "1"})
    try:
        _fill(pool, layer, path, progress)
        layer.seal()
        layer.rename(name)
        layer.set_labels({FILESYSTEM_LABEL: filesystem, "thinpool.source": path.name, **(labels or {})})
        pool.commit()
    except BaseException:
        layer.delete()
        raise
    return layer


def _fill(pool: Pool, layer: Layer, path: Path, progress: Progress | None) -> None:
    directory = pool.path / "run" / f"import-{layer.id}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        layer.mount(directory)
        try:
            with MountedTree(directory) as tree:
                unpack(path, tree, progress=progress)
        finally:
            layer.unmount()
    finally:
        directory.rmdir()
